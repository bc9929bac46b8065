"""One part of a source as token ids on disk: checked, encoded, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from cpm_cluster.training.data.corpus import PROBLEMS_SHOWN, Part, Read, Row
from cpm_cluster.training.data.packing import encode_rows
from cpm_cluster.training.data.tokenizer import Tokenizer
from cpm_cluster.training.files import write_atomically, write_json

_ROWS_AT_ONCE = 256
# About a second's work where text is encoded without help of other cores.
_CHARACTERS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Found:
    """What a part has: rows (right or wrong), the first problems as (row, what), and a digest of its samples."""

    rows: int
    problems: list[tuple[int, str]]
    problem_count: int
    digest: str


class PartFiles:
    """The files of one part: ``part-N.ids``, ``part-N.npy`` and ``part-N.json``.

    They hold the ids of all its samples; int32 [2, samples], how many ids and ``loss_from`` of each; and what
    was found, which is written last.
    """

    def __init__(self, directory: Path, number: int) -> None:
        self.ids, self._table, self.found = (
            directory / f"part-{number:05d}.{suffix}" for suffix in ("ids", "npy", "json")
        )

    def read_found(self) -> Found:
        """Return what the part has."""
        return Found(**json.loads(self.found.read_text(encoding="utf-8")))

    def read_table(self) -> npt.NDArray[np.int32]:
        """Return lengths and ``loss_from``, [2, samples]."""
        table: npt.NDArray[np.int32] = np.load(self._table)
        return table

    def write(self, ids: array[int], table: npt.NDArray[np.int32], found: Found) -> None:
        """Write all three, each atomically."""
        write_atomically(self.ids, lambda file: file.write(memoryview(ids)))
        write_atomically(self._table, lambda file: np.save(file, table))
        write_json(self.found, asdict(found))


def id_type(tokenizer: Tokenizer) -> str:
    """Return the array type code, which is NumPy's too, of the tokenizer's ids: two bytes or four."""
    return "H" if tokenizer.size <= 1 << 16 else "I"


def encode_part(part: Part, files: PartFiles, tokenizer: Tokenizer, task: str) -> Iterator[None]:
    """Write the samples of a part, and what is wrong with it; yields every megabyte or so, until all is written."""
    ids, lengths, loss_from = array(id_type(tokenizer)), array("i"), array("i")
    problems: list[tuple[int, str]] = []
    rows, problem_count = 0, 0
    for group in _in_groups(part.read()):
        checked = [_for_task(item, task) for item in group]
        wrong = [(rows + number, item) for number, item in enumerate(checked, 1) if isinstance(item, str)]
        problems.extend(wrong[: PROBLEMS_SHOWN - len(problems)])
        problem_count += len(wrong)
        rows += len(group)
        for sample in encode_rows([item for item in checked if isinstance(item, Row)], tokenizer):
            ids.frombytes(sample.ids.astype(ids.typecode).tobytes())
            lengths.append(len(sample.ids))
            loss_from.append(sample.loss_from)
        yield
    table = np.array([lengths, loss_from], dtype=np.int32)
    digest = hashlib.sha256(memoryview(ids))
    digest.update(table.tobytes())
    files.write(ids, table, Found(rows, problems, problem_count, digest.hexdigest()))


def _in_groups(items: Iterable[Read]) -> Iterator[list[Read]]:
    """Put together what is encoded at once: a few hundred rows, or fewer long ones."""
    group: list[Read] = []
    characters = 0
    for item in items:
        group.append(item)
        characters += sum(map(len, item)) if isinstance(item, Row) else 0
        if len(group) == _ROWS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _for_task(item: Read, task: str) -> Read:
    if isinstance(item, Row) and item.input and task == "pretrain":
        return '"input" has text, but task pretrain has no prompts; use task finetune, or put it into "output"'
    return item
