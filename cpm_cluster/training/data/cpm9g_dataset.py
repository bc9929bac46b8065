"""CPM-9G's binary datasets, read in place.

A dataset is a folder with ``meta.bin``, one JSON object a line for each data file: ``file_name``,
``block_begin``, ``block_end`` (blocks count through all files), ``nbytes``, ``nlines``, ``mask`` (true: not
used) and ``block_size`` (16 MiB). A block is a row of records, byte 0x1F, the length as a little-endian
uint32 and a pickle, closed by byte 0x00 (OpenBMB's ``cpm_live.dataset.distributed_dataset``).

A pickle may run any code that it names. The rows that CPM-9G writes are plain ``{"input", "output"}`` texts,
which need none, so a pickle that names anything is refused rather than run; even so nothing is unpickled
unless the settings say ``trust_pickle``.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

from cpm_cluster.training.data.corpus import CHANGED, Part, Read, as_row

_META = "meta.bin"
_RECORD, _END_OF_BLOCK = 0x1F, 0x00
_HEADER = struct.Struct("<BI")
_LARGEST_BLOCK = 1 << 30
_KEYS = {"file_name": str, "block_begin": int, "block_end": int, "mask": bool, "block_size": int}


@dataclass(frozen=True)
class Block:
    """One block of a data file; ``number`` counts through the dataset, ``offset`` is in bytes."""

    file: str
    number: int
    offset: int
    nbytes: int
    changed_ns: int

    @property
    def identity(self) -> str:
        """See :class:`cpm_cluster.training.data.corpus.Part`."""
        return f"{self.file} {self.offset} {self.nbytes}"

    def read(self) -> Iterator[Read]:
        """See :class:`cpm_cluster.training.data.corpus.Part`; a record that cannot be told ends the block."""
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                block = file.read(self.nbytes)
                changed = os.fstat(file.fileno()).st_mtime_ns != self.changed_ns
        except OSError as error:
            yield f"cannot be read: {error.strerror}"
            return
        position = 0
        while block[position : position + 1] != bytes([_END_OF_BLOCK]):
            if position + _HEADER.size > len(block):
                yield "is cut short: the block has no end"
                return
            mark, length = _HEADER.unpack_from(block, position)
            position += _HEADER.size
            if mark != _RECORD or position + length > len(block):
                yield f"is no record: it starts with byte 0x{mark:02X} and claims {length} bytes"
                return
            yield _unpickle(block[position : position + length])
            position += length
        if changed:
            yield CHANGED

    def place(self, row: int, rows_before: int) -> str:
        """See :class:`cpm_cluster.training.data.corpus.Part`."""
        return f"{self.file}: block {self.number}, record {row}"


def list_blocks(folder: str, problems: list[str]) -> list[Part]:
    """Return the blocks of a dataset; what is wrong with its description is noted in ``problems``."""
    meta = Path(folder) / _META
    try:
        lines = meta.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{meta}: cannot be read: {getattr(error, 'strerror', 'is not UTF-8')}")
        return []
    blocks: list[Part] = []
    expected, before = 0, len(problems)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        described = _described(line)
        if isinstance(described, str) or described["block_begin"] != expected:
            what = (
                described
                if isinstance(described, str)
                else f"block_begin is not {expected}, where the file before ends"
            )
            problems.append(f"{meta}:{number}: {what}")
            break
        expected = described["block_end"]
        if not described["mask"]:
            blocks.extend(_blocks_of_file(Path(folder), described, problems))
    if not blocks and len(problems) == before:
        problems.append(f"{meta}: names no data")
    return blocks


def _described(line: str) -> dict[str, Any] | str:
    """Return one data file's description, or what is wrong with it."""
    try:
        value = json.loads(line)
    except ValueError as error:
        return f"is not JSON: {error}"
    if not isinstance(value, dict):
        return "is not an object"
    value.setdefault("block_size", 16 << 20)
    for key, expected in _KEYS.items():
        if type(value.get(key)) is not expected:
            return f'"{key}" is missing or of the wrong type'
    if value["block_end"] <= value["block_begin"] or not 0 < value["block_size"] <= _LARGEST_BLOCK:
        return "block_end or block_size is out of range"
    if Path(value["file_name"]).name != value["file_name"]:
        return '"file_name" is not the name of a file in this folder'
    return value


def _blocks_of_file(folder: Path, described: dict[str, Any], problems: list[str]) -> Iterator[Part]:
    path, size = folder / described["file_name"], described["block_size"]
    first, end = described["block_begin"], described["block_end"]
    try:
        found = path.stat()
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")
        return
    if found.st_size != (end - first) * size:
        problems.append(f"{path}: has {found.st_size} bytes, not {end - first} blocks of {size}")
        return
    for number in range(first, end):
        yield Block(str(path), number, (number - first) * size, size, found.st_mtime_ns)


class _PlainValues(pickle.Unpickler):
    """Numbers, texts and containers, which a pickle builds without naming a class or a function."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and a row needs no code")


def _unpickle(record: bytes) -> Read:
    try:
        value = _PlainValues(io.BytesIO(record)).load()
    except Exception as error:  # noqa: BLE001 - a broken pickle raises whatever its bytes happen to mean
        return f"is not a pickle of plain values: {error}"
    return as_row(value) if isinstance(value, dict) else "is not an object"
