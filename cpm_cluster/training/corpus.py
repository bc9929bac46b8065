"""Training text: rows of ``{"input", "output"}`` from jsonl files or a corpus that ships with Python."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Iterable, Iterator, Literal, NamedTuple, Sequence

from cpm_cluster.training.errors import UserError

PYTHON_REFERENCE = "builtin:python-reference"
_PROBLEMS_SHOWN = 20
# Long enough for connected prose, short enough for a row of 256 tokens of the shipped vocabulary.
_PASSAGE_CHARACTERS = 640
_FEWEST_WORDS = 5

Use = Literal["train", "eval"]


class Row(NamedTuple):
    """One sample as text; without an input it is plain text to continue (pretraining)."""

    input: str
    output: str


def read_rows(sources: Sequence[str], use: Use) -> list[Row]:
    """Return the rows of all sources in order.

    Raises UserError listing every problem as ``file:line: what`` (the first twenty, and how many more).
    """
    rows: list[Row] = []
    problems: list[str] = []
    for source in sources:
        if source == PYTHON_REFERENCE:
            rows.extend(python_reference(use))
        else:
            _read_file(Path(source), rows, problems)
    if problems:
        shown = problems[:_PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise UserError("the data have {} problem(s): {}".format(len(problems), "; ".join(shown)))
    return rows


def python_reference(use: Use) -> Iterator[Row]:
    """Yield passages of Python's own language reference (``pydoc_data.topics``).

    A passage's hash decides its use: one in twenty is for evaluation, the others for training.
    """
    from pydoc_data.topics import topics

    for passage in _passages(topics[name] for name in sorted(topics)):
        held_out = hashlib.sha256(passage.encode("utf-8")).digest()[0] % 20 == 0
        if held_out == (use == "eval"):
            yield Row("", passage)


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


def _read_file(path: Path, rows: list[Row], problems: list[str]) -> None:
    before = len(rows) + len(problems)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                row = _parse_row(line)
                if isinstance(row, Row):
                    rows.append(row)
                else:
                    problems.append(f"{path}:{number}: {row}")
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")
        return
    if len(rows) + len(problems) == before:
        problems.append(f"{path}: is empty")


def _parse_row(line: bytes) -> Row | str:
    """Return the row in a line of JSON, or what is wrong with it."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "is not UTF-8"
    except ValueError as error:
        return f"is not JSON: {error}"
    if not isinstance(value, dict):
        return "is not an object"
    for key in ("input", "output"):
        if key not in value:
            return f'has no "{key}"'
        if not isinstance(value[key], str):
            return f'"{key}" is not a text'
    if not value["output"]:
        return '"output" is empty'
    return Row(value["input"], value["output"])
