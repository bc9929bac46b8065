"""What is wrong with what people wrote, and where."""

from __future__ import annotations

import difflib
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
        return printable(f"{self.where}: {self.key}: {self.what}" if self.key else f"{self.where}: {self.what}")


class SpecError(Exception):
    """Everything that is wrong with a job and the files it names, all at once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(sorted(set(problems)))
        super().__init__("\n".join(map(str, self.problems)))


def printable(text: str) -> str:
    """`text` on one line, control characters escaped, so that a hostile file cannot drive the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def quoted(text: str, limit: int = 60) -> str:
    """`text` as an error message shows it: one line, shortened, in double quotes."""
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return '"' + printable(short) + '"'


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean x?)` for the nearest of `known`, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def listed(names: Iterable[str], limit: int = 24) -> str:
    """Names for a message: `a, b or c`; a long list is cut and says so."""
    items: Sequence[str] = list(names)
    if len(items) > limit:
        return ", ".join(items[:limit]) + f" … ({len(items)} in all)"
    return " or ".join(filter(None, (", ".join(items[:-1]), items[-1]))) if items else "nothing"
