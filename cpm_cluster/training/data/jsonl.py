"""Reading jsonl that is no training data: questions and prompts, checked as a whole before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, NamedTuple, Sequence, TypeVar, Union

from cpm_cluster.training.data.corpus import list_problems, matching_files, parse_line, without_mark
from cpm_cluster.training.errors import UserError

T = TypeVar("T")
# What a line holds, or what is wrong with it.
Parsed = Union[T, str]


class Place(NamedTuple):
    """A line of a file, from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def read_objects(sources: Sequence[str], parse: Callable[[dict[str, object]], Parsed[T]]) -> list[tuple[Place, T]]:
    """Return what ``parse`` makes of the JSON object in each line of all files (or patterns of files), in order.

    ``parse`` returns a text when something is wrong. Raises UserError listing every problem as ``file:line: what``.
    """
    found: list[tuple[Place, T]] = []
    problems: list[str] = []
    for path in (path for source in sources for path in _files(source, problems)):
        before = len(found) + len(problems)
        for place, line in _lines(path, problems):
            item = parse_line(line, parse)
            if isinstance(item, str):
                problems.append(f"{place}: {item}")
            else:
                found.append((place, item))
        if len(found) + len(problems) == before:
            problems.append(f"{path}: is empty")
    require_none(problems)
    return found


def require_none(problems: Sequence[str]) -> None:
    """Raise UserError that lists the problems, if there are any."""
    if problems:
        raise UserError(list_problems(problems, len(problems)))


def _files(source: str, problems: list[str]) -> list[Path]:
    files = matching_files(source)
    if not files:
        problems.append(f"{source}: matches no file")
    return files


def _lines(path: Path, problems: list[str]) -> list[tuple[Place, bytes]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")
        return []
    content = without_mark(content).rstrip()
    lines = content.split(b"\n") if content else []
    return [(Place(str(path), number), line) for number, line in enumerate(lines, 1)]
