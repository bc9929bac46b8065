"""Sizes, durations and versions as people write them, and back."""

from __future__ import annotations

import re

_NUMBER = r"([0-9]{1,18}(?:\.[0-9]{1,18})?)"  # more digits mean nothing, and a float could not hold them
_SIZE = re.compile(_NUMBER + r"\s*([A-Za-z]*)")
_DURATION_PARTS = re.compile(
    _NUMBER + r"\s*(weeks?|w|days?|d|hours?|hr?s?|h|minutes?|mins?|m|seconds?|secs?|s)(?![a-z])\s*"
)
_CLOCK = re.compile(r"(?:([0-9]{1,9})-([0-9]{1,2})(?::([0-9]{2}))?(?::([0-9]{2}))?|([0-9]{1,9}):([0-9]{2}):([0-9]{2}))")

_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_DECIMAL = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_SECONDS = {"w": 604_800, "d": 86_400, "h": 3_600, "m": 60, "s": 1}
MAX_BYTES = 1 << 60
MAX_SECONDS = 366 * 86_400


def parse_size(text: str) -> int:
    """Bytes for `512G`, `4GiB`, `80GB`, `1.5 TiB`.

    A bare letter is binary, as Slurm (`--mem`) and Docker (`--shm-size`) read it; KB, MB, GB are decimal (SI);
    KiB, MiB, GiB are binary (IEC 80000-13).

    Raises:
        ValueError: with a sentence that says what is wrong.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError("is not a size")
    number, unit = match.groups()
    if not unit:
        raise ValueError("has no unit")
    factor = _size_factor(unit)
    if factor is None:
        raise ValueError(f"has the unknown unit {unit}")
    size = round(float(number) * factor)
    if size > MAX_BYTES:
        raise ValueError("is more than an exbibyte")
    return size


def _size_factor(unit: str) -> int | None:
    upper = unit.upper()
    if upper == "B":
        return 1
    if len(upper) == 1 or (len(upper) == 3 and upper.endswith("IB")):
        return _BINARY.get(upper[0])
    if len(upper) == 2 and upper.endswith("B"):
        return _DECIMAL.get(upper[0])
    return None


def parse_duration(text: str) -> int:
    """Seconds for `24h`, `1h30m`, `90 min`, `2 days`, `24:00:00` and Slurm's `2-00:00:00`.

    A bare number and `10:30` are refused: Slurm reads them as minutes and minutes:seconds, people often do not.

    Raises:
        ValueError: with a sentence that says what is wrong.
    """
    stripped = text.strip()
    if len(stripped) > 60:
        raise ValueError("is not a duration")
    clock = _CLOCK.fullmatch(stripped)
    if clock:
        days, day_hours, day_minutes, day_seconds, hours, minutes, seconds = (int(g or 0) for g in clock.groups())
        if max(day_minutes, day_seconds, minutes, seconds) > 59:
            raise ValueError("has more than 59 minutes or seconds")
        total = days * 86_400 + (day_hours + hours) * 3_600 + (day_minutes + minutes) * 60 + day_seconds + seconds
    elif re.fullmatch(_NUMBER, stripped):
        raise ValueError("has no unit")
    elif re.fullmatch(r"[0-9]{1,9}:[0-9]{2}", stripped):
        raise ValueError("could be hours:minutes or minutes:seconds")
    else:
        parts = list(_DURATION_PARTS.finditer(stripped.lower()))
        if not parts or "".join(p.group(0) for p in parts) != stripped.lower():
            raise ValueError("is not a duration")
        total = round(sum(float(p.group(1)) * _SECONDS[p.group(2)[0]] for p in parts))
    if total > MAX_SECONDS:
        raise ValueError("is more than a year")
    return total


def format_size(size: int) -> str:
    """`4 GiB`, `1.5 TiB`: binary units, at most one decimal."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.1f}".rstrip("0").rstrip(".") + f" {unit}"


def format_duration(seconds: float) -> str:
    """`45 s`, `2 min 5 s`, `24 h`, `2 d 3 h`: the two largest units."""
    left, parts = round(seconds), []
    for name, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2]) or "0 s"


def slurm_time(seconds: int) -> str:
    """`days-hours:minutes:seconds`, as `sbatch --time` takes it (man sbatch)."""
    days, rest = divmod(seconds, 86_400)
    return f"{days}-{rest // 3600:02}:{rest % 3600 // 60:02}:{rest % 60:02}"


def version_tuple(version: str | None) -> tuple[int, ...]:
    """(29, 5, 1) for "29.5.1"; () where nothing is known."""
    digits = ("".join(c for c in part if c.isdigit()) for part in (version or "").split("+")[0].split("."))
    return tuple(int(part) for part in digits if part)
