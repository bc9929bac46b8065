"""The index of a run's samples: made once, by all ranks together, the same whoever makes it."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_runs import TINY, changed, encode_row, source

from cpm_cluster.training.data import corpus, token_index
from cpm_cluster.training.data.corpus import Row
from cpm_cluster.training.data.token_index import Ranks, open_samples
from cpm_cluster.training.data.tokenizer import SPECIAL_TOKENS, CpmTokenizer, load_tokenizer
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.placement import Placement
from cpm_cluster.training.settings_file import parse_settings
from cpm_cluster.training.stop import Stopped

BYTES = load_tokenizer("bytes")
ALONE = Placement(0, 1, 0)
TEXTS = ["one", "the second", "3", "a fourth text that is the longest of all", "five"]


def nothing(done: int, total: int) -> None:
    """Take no note of progress."""


def never() -> bool:
    """Not want to stop."""
    return False


@pytest.fixture
def make(tmp_path, tiny_settings):
    """Return settings of a run on rows: ``make(texts, **{"training.seq_len": 8})``."""

    def settings(rows=TEXTS, **changes):
        data = tmp_path / "rows.jsonl"
        objects = [row if isinstance(row, dict) else {"input": "", "output": row} for row in rows]
        data.write_text("".join(json.dumps(row) + "\n" for row in objects))
        source = {"path": str(data), "weight": None}
        return tiny_settings(**{"output_dir": str(tmp_path / "run"), "data.train": [source], **changes})

    return settings


def opened(settings, tokenizer=BYTES, placement=ALONE, all_gather=lambda value: [value], tick=nothing, stop=never):
    return open_samples(settings, "train", tokenizer, Ranks(placement, all_gather, tick, stop))


def opened_by_ranks(settings, count: int, stop=lambda rank: False) -> list:
    """Open the data on threads that stand for ranks; what each raises takes the place of its samples."""
    meeting = threading.Barrier(count, timeout=30)
    said = [0] * count

    def open_as(rank: int):
        def gather(value):
            said[rank] = value
            meeting.wait()
            values = list(said)
            meeting.wait()
            return values

        return opened(settings, BYTES, Placement(rank, count, rank), gather, stop=lambda: stop(rank))

    with ThreadPoolExecutor(count) as threads:
        ranks = [threads.submit(open_as, rank) for rank in range(count)]
        return [rank.exception() or rank.result() for rank in ranks]


def texts_of(samples) -> list[str]:
    return [BYTES.decode(samples[number].ids) for number in range(len(samples))]


def files_of(settings) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (Path(settings.output_dir) / "index").rglob("*.*")}


def test_every_sample_is_reached_by_its_number(make):
    samples = opened(make([{"input": "who?", "output": "me"}, "plain"]))

    for number, row in enumerate([Row("who?", "me"), Row("", "plain")]):
        expected = encode_row(row, BYTES)
        assert samples[number].ids.tolist() == expected.ids.tolist()
        assert samples[number].loss_from == expected.loss_from
        assert samples.inputs[number] == len(expected.ids) - 1
    assert samples.summary.tokens == sum(samples.inputs)


def test_large_vocabularies_have_wide_ids(make):
    pieces = [chr(0x4E00 + number % 20000) + chr(0x4E00 + number // 20000) for number in range(70_000)]
    tokenizer = CpmTokenizer([*SPECIAL_TOKENS, *pieces])

    samples = opened(make([pieces[-1] + pieces[0]]), tokenizer)

    assert samples[0].ids.tolist() == [1, 259 + 69_999, 259, 2]


def test_what_was_encoded_is_not_encoded_again(make, monkeypatch):
    settings = make()
    first = opened(settings)
    before = files_of(settings)
    monkeypatch.setattr(token_index, "encode_part", None)

    second = opened(settings)

    assert texts_of(second) == texts_of(first) == TEXTS
    assert files_of(settings) == before


def test_an_attempt_that_died_leaves_the_parts_that_it_had_finished(make, monkeypatch):
    monkeypatch.setattr(corpus, "PART_BYTES", 40)
    settings = make()

    def power_cut(directory, by_source, found, settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(token_index, "_join", power_cut)
        opened(settings)
    directory = next((Path(settings.output_dir) / "index").iterdir())
    (directory / "part-00001.json").unlink()
    before = files_of(settings)

    assert texts_of(opened(settings)) == TEXTS

    again = {name for name, time in files_of(settings).items() if before.get(name) != time}
    assert again == {"part-00001.ids", "part-00001.npy", "part-00001.json", "samples.npy", "summary.json"}


@pytest.mark.parametrize("asked", [0, 2])
def test_all_ranks_stop_when_one_wants_to_and_what_they_have_encoded_is_used_again(make, monkeypatch, asked):
    monkeypatch.setattr(corpus, "PART_BYTES", 40)
    monkeypatch.setattr(token_index, "_SECONDS_A_ROUND", 0.0)
    settings = make(TEXTS * 4)
    rounds: list[int] = []

    def stop(rank: int) -> bool:
        rounds.append(rank)
        return rank == asked and rounds.count(rank) == 3

    ended = opened_by_ranks(settings, 3, stop)

    assert {type(end) for end in ended} == {Stopped}
    before = {name: time for name, time in files_of(settings).items() if name.endswith("json")}
    assert before and "summary.json" not in before
    assert all(texts_of(samples) == TEXTS * 4 for samples in opened_by_ranks(settings, 3))
    after = files_of(settings)
    assert {name: after[name] for name in before} == before


def test_a_rank_that_does_not_see_yet_what_an_earlier_attempt_made_waits_for_it(make, monkeypatch):
    settings = make()
    opened(settings)
    summary = next((Path(settings.output_dir) / "index").glob("*/summary.json"))
    hidden = summary.rename(summary.with_suffix(".hidden"))
    reappear = threading.Timer(0.1, lambda: hidden.rename(summary))
    reappear.start()

    # Rank 0 sees it: its word is 1 for "there".
    samples = opened(settings, placement=Placement(1, 2, 1), all_gather=lambda value: [value or 1, value])

    reappear.join()
    assert texts_of(samples) == TEXTS


def test_data_that_change_while_they_are_read_are_refused_until_they_are_whole(make):
    settings = make()
    path = Path(settings.data.train[0].path)

    def append(done: int, total: int) -> None:
        if done == 0:
            with open(path, "a") as file:
                file.write(json.dumps({"input": "", "output": "late"}) + "\n")

    with pytest.raises(UserError, match=r"rows.jsonl:6: has changed while it was read; begin when it is whole"):
        opened(settings, tick=append)

    assert texts_of(opened(settings))[:5] == TEXTS


@pytest.mark.parametrize("what", ["text", "time", "tokenizer", "seq_len", "task"])
def test_changed_data_or_settings_are_encoded_anew_and_the_old_ones_removed(make, what):
    settings = make()
    opened(settings)
    (old,) = (Path(settings.output_dir) / "index").iterdir()
    tokenizer = BYTES
    if what == "text":
        settings = make(["another text", *TEXTS])
    elif what == "time":
        os.utime(settings.data.train[0].path, ns=(0, 0))
    elif what == "tokenizer":
        tokenizer = CpmTokenizer([*SPECIAL_TOKENS, "the"])
    else:
        settings = make(**{f"training.{what}": 64} if what == "seq_len" else {"task": "pretrain"})

    opened(settings, tokenizer)

    (new,) = (Path(settings.output_dir) / "index").iterdir()
    assert new.name != old.name


@hypothesis_settings(max_examples=10, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=12), st.integers(1, 4), st.integers(60, 600))
def test_ranks_make_together_what_one_makes_alone(tmp_path_factory, texts, ranks, part_bytes):
    folder = tmp_path_factory.mktemp("index")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"input": "", "output": text}) + "\n" for text in texts))

    def run(name: str):
        changes = {"output_dir": str(folder / name), "data.train": [source(folder / "rows.jsonl")]}
        return parse_settings(changed(TINY, {**changes, "training.seq_len": 300}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PART_BYTES", part_bytes)
        alone, together = opened(run("alone")), opened_by_ranks(run("together"), ranks)

    for samples in together:
        assert texts_of(samples) == texts_of(alone)
        assert samples.summary == alone.summary


def test_all_ranks_learn_what_is_wrong_wherever_it_was_read(make, monkeypatch):
    monkeypatch.setattr(corpus, "PART_BYTES", 30)
    settings = make([*TEXTS, {"input": ""}, "fine", {"output": "x"}])
    file = settings.data.train[0].path

    errors = opened_by_ranks(settings, 3)

    assert {type(error) for error in errors} == {UserError}
    (message,) = {str(error) for error in errors}
    assert "2 problem(s)" in message
    assert f'{file}:6: has no "output"' in message and f'{file}:8: has no "input"' in message
    with pytest.raises(UserError, match="2 problem"):
        opened(settings)


def test_a_file_that_could_not_be_read_is_read_by_the_next_attempt(make, monkeypatch):
    settings = make()
    with monkeypatch.context() as broken:
        broken.setattr(corpus.JsonLines, "read", lambda part: iter(["cannot be read: Stale file handle"]))
        with pytest.raises(UserError, match=r"rows.jsonl:1: cannot be read: Stale file handle"):
            opened(settings)

    assert texts_of(opened(settings)) == TEXTS


def test_lines_are_counted_in_each_file_even_if_two_sources_name_it(make):
    settings = make([*TEXTS, {"input": ""}])
    path = settings.data.train[0].path
    sources = [{"path": path, "weight": None}, {"path": path + "*", "weight": None}]

    with pytest.raises(UserError, match=r"2 problem") as caught:
        opened(make([*TEXTS, {"input": ""}], **{"data.train": sources}))

    assert str(caught.value).count(f"{path}:6: ") == 2


def test_thousands_of_problems_in_many_parts_are_counted_and_twenty_shown(make, monkeypatch):
    monkeypatch.setattr(corpus, "PART_BYTES", 1000)
    settings = make([{"input": ""}] * 2000)

    with pytest.raises(UserError, match=r"2000 problem.*and 1980 more") as caught:
        opened(settings)

    assert str(caught.value).count("has no") == 20


def test_ranks_that_see_other_files_say_so_at_once(make):
    with pytest.raises(UserError, match="the ranks see different data"):
        opened(make(), placement=Placement(1, 2, 1), all_gather=lambda value: [value - 1, value])


def test_copies_with_other_times_on_the_nodes_are_the_same_data(make):
    settings = make()
    first = opened(settings)
    calls = []

    def gather(value: int) -> list[int]:
        """Answer as if rank 0 had read the file as it was before it was touched."""
        calls.append(value)
        return [times[0] if len(calls) == 2 else value, value]

    times: list[int] = []
    opened(settings, all_gather=lambda value: times.append(value) or [value])
    del times[0]
    os.utime(settings.data.train[0].path, ns=(0, 0))

    second = opened(settings, placement=Placement(1, 2, 1), all_gather=gather)

    assert texts_of(second) == texts_of(first)


def test_too_long_samples_are_dropped_and_counted(make):
    samples = opened(make(["x" * 7, "x" * 8, "y"], **{"training.seq_len": 8}))

    assert texts_of(samples) == ["x" * 7, "y"]
    assert (samples.summary.rows, samples.summary.dropped) == (3, 1)
    with pytest.raises(UserError, match="must fit into seq_len 2 tokens, and none of the 2 samples does"):
        opened(make(["x" * 7, "x" * 8], **{"training.seq_len": 2}))


def test_a_source_of_which_nothing_is_left_is_named(make, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"input": "", "output": "x" * 100}) + "\n")
    settings = make()
    sources = [{"path": settings.data.train[0].path, "weight": 1.0}, {"path": str(tmp_path / "l*"), "weight": 1.0}]

    with pytest.raises(UserError, match=r"long.jsonl has none that does"):
        opened(make(**{"data.train": sources}))


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 9))
def test_pretraining_splits_long_documents_so_that_each_id_is_a_target_once(tmp_path_factory, sizes, seq_len):
    folder = tmp_path_factory.mktemp("index")
    texts = [chr(97 + number) * (size + 1) for number, size in enumerate(sizes)]
    (folder / "rows").write_text("".join(json.dumps({"input": "", "output": text}) + "\n" for text in texts))
    changes = {"output_dir": str(folder / "run"), "data.train": [source(folder / "rows")], "task": "pretrain"}

    samples = opened(parse_settings(changed(TINY, {**changes, "training.seq_len": seq_len})))

    pieces = [samples[number] for number in range(len(samples))]
    assert all(1 <= len(piece.ids) - 1 <= seq_len and piece.loss_from == 1 for piece in pieces)
    targets = [number for piece in pieces for number in piece.ids[1:].tolist()]
    assert targets == [number for text in texts for number in [*BYTES.encode(text), BYTES.eos]]
    assert samples.summary.dropped == 0 and samples.summary.rows == len(texts)


def test_pretraining_has_no_prompts(make):
    with pytest.raises(UserError, match=r'rows.jsonl:2: "input" has text, but task pretrain has no prompts'):
        opened(make(["fine", {"input": "who?", "output": "me"}], task="pretrain"))


def test_progress_is_told_in_bytes(make, monkeypatch):
    monkeypatch.setattr(corpus, "PART_BYTES", 40)
    settings = make(TEXTS * 4)
    told: list[tuple[int, int]] = []

    opened(settings, tick=lambda done, total: told.append((done, total)))

    size = len(Path(settings.data.train[0].path).read_bytes().rstrip())
    assert {total for _, total in told} == {size}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[0][0] == 0 and size - 40 <= told[-1][0] <= size
