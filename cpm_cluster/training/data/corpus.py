"""Training text: rows of ``{"input", "output"}`` from jsonl files or a corpus that ships with Python.

Sources are read in parts of some megabytes, each on its own, so that ranks share the work and a row is never
farther away than its part.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator, Literal, NamedTuple, Protocol, Sequence, TypeVar, Union, cast

from cpm_cluster.training.errors import UserError

PYTHON_REFERENCE = "builtin:python-reference"
PROBLEMS_SHOWN = 20
PART_BYTES = 8 << 20
_SMALL_PART_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
# What files of other kinds begin with.
_NO_LINES_OF_TEXT = {
    b"\x1f\x8b": "is compressed by gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it first",
    b"\xfd7zXZ\0": "is compressed by xz; unpack it first",
    b"BZh": "is compressed by bzip2; unpack it first",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"PAR1": "is Parquet; make jsonl of it",
    b"\xff\xfe": "is UTF-16; make UTF-8 of it",
    b"\xfe\xff": "is UTF-16; make UTF-8 of it",
    b"[": "is one JSON array; write an object a line",
}
# Long enough for connected prose, short enough for a row of 256 tokens of the shipped vocabulary.
_PASSAGE_CHARACTERS = 640
_FEWEST_WORDS = 5
CHANGED = "has changed while it was read; begin when it is whole"

Use = Literal["train", "eval"]
T = TypeVar("T")


class Row(NamedTuple):
    """One sample as text; without an input it is plain text to continue (pretraining)."""

    input: str
    output: str


# A row, or what is wrong with it.
Read = Union[Row, str]


class Part(Protocol):
    """A piece of a source that is read in one go."""

    @property
    def file(self) -> str:
        """What it is a part of; rows are counted over all parts of a file."""

    @property
    def nbytes(self) -> int:
        """How much there is to read, for progress."""

    @property
    def identity(self) -> str:
        """Which bytes of what these are."""

    @property
    def changed_ns(self) -> int:
        """When the file was changed, in nanoseconds."""

    def read(self) -> Iterator[Read]:
        """Yield each row, or what is wrong with it."""

    def place(self, row: int, rows_before: int) -> str:
        """Say where row ``row`` (from 1) of this part is; the parts of the file before it have ``rows_before``."""


@dataclass(frozen=True)
class JsonLines:
    """The lines of a jsonl file that start in the bytes [begin, end)."""

    file: str
    begin: int
    end: int
    changed_ns: int

    @property
    def nbytes(self) -> int:
        """See :class:`Part`."""
        return self.end - self.begin

    @property
    def identity(self) -> str:
        """See :class:`Part`."""
        return f"{self.file} {self.begin} {self.end}"

    def read(self) -> Iterator[Read]:
        """See :class:`Part`; a byte order mark and Windows line ends are passed over."""
        try:
            with open(self.file, "rb") as lines:
                # The line that holds the byte before belongs to the part before, even if it ends here.
                lines.seek(max(0, self.begin - 1))
                position = self.begin - 1 + len(lines.readline()) if self.begin else 0
                while position < self.end:
                    line = lines.readline()
                    if not line:
                        yield "is missing: the file has become shorter"
                        return
                    yield parse_line(without_mark(line) if position == 0 else line, as_row)
                    position += len(line)
                # Else the next attempt would find other data, and refuse to go on.
                if os.fstat(lines.fileno()).st_mtime_ns != self.changed_ns:
                    yield CHANGED
        except OSError as error:
            yield f"cannot be read: {error.strerror}"

    def place(self, row: int, rows_before: int) -> str:
        """See :class:`Part`."""
        return f"{self.file}:{rows_before + row}"


@dataclass(frozen=True)
class PythonReference:
    """Passages of Python's own language reference (``pydoc_data.topics``).

    A passage's hash decides its use: one in twenty is for evaluation, the others for training.
    """

    use: Use
    file = PYTHON_REFERENCE
    nbytes = 1 << 20
    changed_ns = 0

    @property
    def identity(self) -> str:
        """See :class:`Part`; each version of Python has another text."""
        return f"{self.file} {self.use} {sys.version}"

    def read(self) -> Iterator[Read]:
        """See :class:`Part`."""
        from pydoc_data.topics import topics

        for passage in _passages(topics[name] for name in sorted(topics)):
            held_out = hashlib.sha256(passage.encode("utf-8")).digest()[0] % 20 == 0
            if held_out == (self.use == "eval"):
                yield Row("", passage)

    def place(self, row: int, rows_before: int) -> str:
        """See :class:`Part`."""
        return f"{self.file}: passage {row}"


def list_parts(source: str, use: Use, problems: list[str]) -> list[Part]:
    """Return the parts of a file, of all files that a pattern matches, or of the built-in corpus.

    What cannot be read is noted in ``problems``.
    """
    if source == PYTHON_REFERENCE:
        return [PythonReference(use)]
    parts: list[Part] = []
    before = len(problems)
    for path in matching_files(source):
        if path.is_dir():
            problems.append(f"{path}: is a folder; write {path}/*.jsonl for the files in it")
            continue
        if path.exists() and not path.is_file():
            problems.append(f"{path}: is a pipe or a device; data are read from files, in parts")
            continue
        try:
            parts.extend(_parts_of_file(path, problems))
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror}")
    if not parts and len(problems) == before:
        problems.append(f"{source}: matches no file")
    return parts


def matching_files(source: str) -> list[Path]:
    """Return the file of that name, else those that match it as a pattern (``**``: all folders below), sorted."""
    if os.path.lexists(source) or not glob.has_magic(source):
        return [Path(source)]
    return [Path(match) for match in sorted(glob.glob(source, recursive=True))]


def read_rows(sources: Sequence[str], use: Use) -> list[Row]:
    """Return the rows of all sources in order.

    Raises UserError listing every problem as ``file:line: what`` (the first twenty, and how many more).
    """
    problems: list[str] = []
    rows: list[Row] = []
    for source in sources:
        rows_before: dict[str, int] = {}
        for part in list_parts(source, use, problems):
            number, before = 0, rows_before.get(part.file, 0)
            for number, item in enumerate(part.read(), 1):
                if isinstance(item, Row):
                    rows.append(item)
                else:
                    problems.append(f"{part.place(number, before)}: {item}")
            rows_before[part.file] = before + number
    if problems:
        raise UserError(list_problems(problems, len(problems)))
    return rows


def list_problems(problems: Sequence[str], count: int) -> str:
    """Return one message of the first twenty of ``count`` problems."""
    shown = list(problems[:PROBLEMS_SHOWN])
    if count > len(shown):
        shown.append(f"and {count - len(shown)} more")
    return "the data have {} problem(s): {}".format(count, "; ".join(shown))


def parse_line(line: bytes, parse: Callable[[dict[str, object]], T | str]) -> T | str:
    """Return what ``parse`` makes of the object in a line of JSON, or what is wrong with the line."""
    if b"\0" in line:
        return "has NUL bytes, as a file has that was not written to its end"
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 from byte {error.start + 1} on"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}" if line.strip() else "is not JSON: the line is blank"
    return parse(value) if isinstance(value, dict) else "is not an object"


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return what a JSON object says; raises ValueError if it says a thing twice, of which one would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'it has the key "{twice:.40}" twice')
    return value


def without_mark(text: bytes) -> bytes:
    """Return what a file begins with, without the byte order mark that some write."""
    return text[len(_BOM) :] if text.startswith(_BOM) else text


def as_row(value: dict[str, object]) -> Read:
    """Return an object as a row, or what is wrong with it; keys besides ``input`` and ``output`` do no harm."""
    for key in ("input", "output"):
        if key not in value:
            return f'has no "{key}"'
        if not isinstance(value[key], str):
            return f'"{key}" is not a text'
    if not value["output"]:
        return '"output" is empty'
    return Row(cast(str, value["input"]), cast(str, value["output"]))


def _parts_of_file(path: Path, problems: list[str]) -> list[Part]:
    with open(path, "rb") as file:
        begins = without_mark(file.read(16))
    other = next((what for magic, what in _NO_LINES_OF_TEXT.items() if begins.startswith(magic)), None)
    if other is not None:
        problems.append(f"{path}: {other}")
        return []
    end = _end_of_text(path)
    if end == 0:
        problems.append(f"{path}: is empty")
    changed = path.stat().st_mtime_ns
    # Enough parts for all ranks to have some, and never so many that opening them takes longer than reading.
    size = min(PART_BYTES, max(_SMALL_PART_BYTES, end // 64))
    return [JsonLines(str(path), begin, min(begin + size, end), changed) for begin in range(0, end, size)]


def _end_of_text(path: Path) -> int:
    """Return where the last line that is not blank ends."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - (1 << 16))
            file.seek(begin)
            kept = len(file.read(end - begin).rstrip(_BLANK))
            if kept:
                return begin + kept
            end = begin
    return 0


def _passages(texts: Iterable[str]) -> Iterator[str]:
    """Join consecutive prose paragraphs of a text to passages of a few hundred characters.

    A paragraph that several texts share is taken once: what is held out must not be trained on elsewhere.
    """
    taken: set[str] = set()
    for text in texts:
        passage = ""
        for paragraph in text.split("\n\n"):
            prose = " ".join(paragraph.split())
            if prose in taken or not _is_prose(prose):
                continue
            taken.add(prose)
            if passage and len(passage) + len(prose) > _PASSAGE_CHARACTERS:
                yield passage
                passage = ""
            passage = f"{passage}\n{prose}" if passage else prose
        if passage:
            yield passage


def _is_prose(paragraph: str) -> bool:
    """Tell sentences from headings, grammar, code and tables."""
    ends_like_prose = paragraph.endswith((".", ".)", ":", "?"))
    marked = any(mark in paragraph for mark in (">>>", "::=", "---", " | ", "Traceback"))
    return ends_like_prose and not marked and len(paragraph.split()) >= _FEWEST_WORDS
