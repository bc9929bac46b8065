"""Sizes and durations: what people write, what it means, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_cluster.specs.values import (
    MAX_BYTES,
    MAX_SECONDS,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
    slurm_time,
)

KI, MI, GI, TI = 1 << 10, 1 << 20, 1 << 30, 1 << 40
HOUR, DAY = 3_600, 86_400


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512G", 512 * GI),  # a bare letter is binary, as in sbatch --mem and docker --shm-size
        ("512g", 512 * GI),
        ("4GiB", 4 * GI),
        ("80GB", 80 * 10**9),  # SI
        ("80gb", 80 * 10**9),
        ("1.5 TiB", 3 * TI // 2),
        ("16K", 16 * KI),
        ("100MB", 10**8),
        ("100MiB", 100 * MI),
        ("2P", 2 << 50),
        ("7B", 7),
        ("  64 M ", 64 * MI),
        ("0.5K", 512),
    ],
)
def test_a_size_in_bytes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("512", "has no unit"),
        ("4 Go", "has the unknown unit Go"),
        ("4GiBi", "has the unknown unit GiBi"),
        ("4X", "has the unknown unit X"),
        ("G", "is not a size"),
        ("-4G", "is not a size"),
        ("4,5G", "is not a size"),
        ("4 G G", "is not a size"),
        ("", "is not a size"),
        ("٤G", "is not a size"),  # a digit for Unicode, not for Slurm
        ("9" * 400 + "G", "is not a size"),
        ("2000P", "is more than an exbibyte"),
    ],
)
def test_what_is_no_size(text, says):
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("24h", DAY),
        ("1h30m", HOUR + 1_800),
        ("1h 30m", HOUR + 1_800),
        ("90 min", 5_400),
        ("2 days", 2 * DAY),
        ("1.5h", 5_400),
        ("2W", 14 * DAY),
        ("45s", 45),
        ("24:00:00", DAY),
        ("100:00:01", 360_001),
        ("2-00:00:00", 2 * DAY),  # Slurm: days-hours:minutes:seconds
        ("1-12:30", DAY + 12 * HOUR + 1_800),  # Slurm: days-hours:minutes
        ("1-12", DAY + 12 * HOUR),  # Slurm: days-hours
    ],
)
def test_a_duration_in_seconds(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("24", "has no unit"),
        ("1.5", "has no unit"),
        ("10:30", "could be hours:minutes or minutes:seconds"),
        ("1h30", "is not a duration"),
        ("5ms", "is not a duration"),
        ("1 month", "is not a duration"),
        ("2 fortnights", "is not a duration"),
        ("-1h", "is not a duration"),
        ("", "is not a duration"),
        ("1:60:00", "has more than 59 minutes or seconds"),
        ("1-00:00:99", "has more than 59 minutes or seconds"),
        ("400d", "is more than a year"),
        ("9" * 400 + "h", "is not a duration"),
        ("1h" * 100_000, "is not a duration"),
    ],
)
def test_what_is_no_duration(text, says):
    with pytest.raises(ValueError) as caught:
        parse_duration(text)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (KI, "1 KiB"), (4 * GI, "4 GiB"), (3 * TI // 2, "1.5 TiB"), (10 * TI, "10 TiB")],
)
def test_a_size_is_shown_in_the_largest_unit(size, text):
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (45, "45 s"),
        (125, "2 min 5 s"),
        (DAY, "1 d"),
        (2 * DAY + 3 * HOUR + 59, "2 d 3 h"),
        (DAY + 1, "1 d 1 s"),
    ],
)
def test_a_duration_is_shown_in_its_two_largest_units(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(59, "0-00:00:59"), (DAY, "1-00:00:00"), (7 * DAY + HOUR + 61, "7-01:01:01")]
)
def test_a_duration_as_sbatch_takes_it(seconds, text):
    assert slurm_time(seconds) == text


@given(st.integers(0, MAX_BYTES))
def test_a_size_that_is_shown_can_be_written(size):
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.05)


@given(st.integers(0, 1023), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB"]))
def test_a_round_size_is_read_back_as_it_was(count, unit):
    size = parse_size(f"{count}{unit}")

    assert parse_size(format_size(size)) == size


@given(st.integers(0, MAX_SECONDS))
def test_a_duration_for_slurm_is_read_back_as_it_was(seconds):
    assert parse_duration(slurm_time(seconds)) == seconds


@given(st.integers(0, MAX_SECONDS))
def test_a_duration_that_is_shown_can_be_written(seconds):
    shown = parse_duration(format_duration(seconds))

    assert shown <= seconds
    assert seconds - shown < max(60, seconds / 24)  # what two units leave out


@given(st.integers(0, 364), st.integers(0, 23))
def test_days_and_hours_are_read_back_as_they_were(days, hours):
    seconds = days * DAY + hours * HOUR

    assert parse_duration(format_duration(seconds)) == seconds


@given(st.text(max_size=80))
def test_any_text_is_a_value_or_refused_with_a_sentence(text):
    for parse in (parse_size, parse_duration):
        try:
            assert parse(text) >= 0
        except ValueError as error:
            assert str(error).startswith(("is ", "has ", "could "))
