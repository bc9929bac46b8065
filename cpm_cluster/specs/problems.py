"""What is wrong with what people wrote, and where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Location:
    """A place in a file (line and column count from 1), or an option of the command line (line 0)."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, order=True)
class Problem:
    """One thing to mend. `key` is the dotted path in the file, empty where the file as a whole is meant."""

    where: Location
    key: str
    what: str

    def __str__(self) -> str:
        key = shortened(self.key, 120)
        return printable(f"{self.where}: {key}: {self.what}" if key else f"{self.where}: {self.what}")


class SpecError(Exception):
    """Everything that is wrong with a job and the files it names, all at once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(sorted(set(problems)))
        super().__init__("\n".join(map(str, self.problems)))


def printable(text: str) -> str:
    """`text` on one line, control characters escaped, so that a hostile file cannot drive the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def quoted(text: str, limit: int = 60) -> str:
    """`text` as an error message shows it: one line, shortened, in double quotes."""
    return '"' + printable(shortened(text, limit)) + '"'


def nearest(word: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Those of `known` that may be meant: `steps` for `step`, `LR` for `lr`, `gpu, gpus_per_node` for `gpus`."""
    by_lower = {name.lower(): name for name in known}
    lower = word.lower()
    import difflib  # only where something is misspelt

    alike = difflib.get_close_matches(lower, by_lower, n=most, cutoff=0.6)
    begun = [name for name in by_lower if name.startswith(lower + "_")]
    if lower in by_lower or len(begun) > 1:
        begun = []
    return [by_lower[name] for name in dict.fromkeys(alike + begun)]


def did_you_mean(word: str, known: Iterable[str], most: int = 1) -> str:
    """` (did you mean x?)` for those of `known` that have the word as a part (100b: cpm-9g-100b), or the nearest."""
    names = list(known)
    whole = [name for name in names if "-" in name and word.lower() in name.lower().split("-")]
    near = whole or nearest(word, names, most)
    return f" (did you mean {listed(near)}?)" if near else ""


def listed(names: Iterable[str], limit: int = 32) -> str:
    """Names to choose from, for a message: `a, b or c`; a long list is cut and says so."""
    items: Sequence[str] = list(names)
    if len(items) > limit:
        return ", ".join(items[:limit]) + f" … ({len(items)} in all)"
    return " or ".join(filter(None, (", ".join(items[:-1]), items[-1]))) if items else "nothing"
