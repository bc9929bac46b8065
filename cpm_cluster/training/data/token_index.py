"""Samples as token ids on disk, made once before the first step, then memory-mapped.

``index/USE-KEY/`` in the run directory holds the files of each part of the sources (encoded_part.py), and of all
parts together ``samples.npy`` and ``summary.json``. The key stands for files, their sizes and times, tokenizer
and settings. Ranks encode different parts, in rounds of a second: after each they tell one another how far they are,
and whether to stop. What an attempt that was stopped has encoded is there for the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from bisect import bisect_right
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from cpm_cluster.training.data.corpus import PROBLEMS_SHOWN, Part, Use, list_parts, list_problems
from cpm_cluster.training.data.cpm9g_dataset import list_blocks
from cpm_cluster.training.data.encoded_part import Found, PartFiles, encode_part, id_type
from cpm_cluster.training.data.packing import Sample
from cpm_cluster.training.data.tokenizer import Tokenizer
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import write_atomically, write_json
from cpm_cluster.training.placement import Placement
from cpm_cluster.training.settings import Settings, SourceSettings
from cpm_cluster.training.stop import Stopped

_FORMAT = 1
# These leave no text out; fine-tuning has no use for half an answer.
_SPLIT_BY = ("pretrain", "evaluate")
_MAPPED_PARTS = 256
_LONGEST_PAUSE = 1.0
_SECONDS_A_ROUND = 1.0
# What a rank says, in place of the bytes that it has encoded, when it wants to stop.
_STOP = -1
# start: first id within the part's file; inputs: ids but one; loss_from: as in Sample.
_SAMPLE = np.dtype([("start", "<i8"), ("inputs", "<i4"), ("loss_from", "<i4")])

# Told how many bytes of how many have been encoded.
Tick = Callable[[int, int], None]
AllGather = Callable[[int], List[int]]
Table = npt.NDArray[np.void]


class Ranks(NamedTuple):
    """The ranks that read data together, as this one sees them."""

    placement: Placement
    all_gather: AllGather
    tick: Tick
    wants_to_stop: Callable[[], bool]


@dataclass(frozen=True)
class Summary:
    """What all parts have together; a ``problem`` makes them unusable.

    ``per_source`` and ``per_part`` count samples, ``dropped`` counts rows longer than ``seq_len``;
    ``fingerprint`` stands for the samples in their order.
    """

    problem: str | None
    per_source: list[int]
    per_part: list[int]
    rows: int
    dropped: int
    tokens: int
    fingerprint: str


class Samples:
    """The samples of one use, by number."""

    def __init__(self, directory: Path, summary: Summary, id_type: str) -> None:
        """Map what :func:`open_samples` made."""
        self.summary = summary
        self._directory, self._id_type = directory, id_type
        # Plain views of the mapped files: NumPy's memmap makes each slice ten times dearer.
        self._table = np.asarray(np.load(directory / "samples.npy", mmap_mode="r"))
        self._ends = list(accumulate(summary.per_part))
        self._ids_of_part = lru_cache(maxsize=_MAPPED_PARTS)(self._map_part)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> Sample:
        start, inputs, loss_from = self._table[number].item()
        return Sample(self._ids_of_part(bisect_right(self._ends, number))[start : start + inputs + 1], loss_from)

    @property
    def inputs(self) -> npt.NDArray[np.int32]:
        """The length of each sample, as inputs: one less than its ids."""
        return cast("npt.NDArray[np.int32]", self._table["inputs"])

    @property
    def targets(self) -> npt.NDArray[np.int32]:
        """How many tokens of each sample carry loss."""
        targets: npt.NDArray[np.int32] = np.maximum(0, self._table["inputs"] + 1 - self._table["loss_from"])
        return targets

    def _map_part(self, part: int) -> npt.NDArray[Any]:
        return np.asarray(np.memmap(PartFiles(self._directory, part).ids, self._id_type, "r"))


def open_samples(settings: Settings, use: Use, tokenizer: Tokenizer, ranks: Ranks) -> Samples:
    """Read, check and encode the data of one use, unless that was done before. Collective.

    Raises UserError, the same on every rank, listing what is wrong with the data; Stopped, on every rank, soon after
    one wants to stop.
    """
    sources = settings.data.train if use == "train" else settings.data.eval
    listing: list[str] = []
    by_source = [_parts_of(source, settings, use, listing) for source in sources]
    key = _key(settings, tokenizer, by_source, listing, ranks.all_gather)
    directory = Path(settings.output_dir) / "index" / f"{use}-{key}"
    summary = directory / "summary.json"
    # Of a file that is there for some nodes and not yet for others, rank 0 says whether it is.
    if not ranks.all_gather(int(summary.exists()))[0]:
        directory.mkdir(parents=True, exist_ok=True)
        parts = [part for of_source in by_source for part in of_source]
        _encode(directory, parts, tokenizer, settings.task, ranks)
        if ranks.placement.rank == 0:
            found = _wait_for_parts(directory, parts, ranks)
            write_json(summary, asdict(_summarise(directory, by_source, found, listing, settings)))
            _remove_others(directory, use)
    _wait_until(summary.exists, lambda: ranks.tick(0, 0))
    made = Summary(**json.loads(summary.read_text(encoding="utf-8")))
    if made.problem is not None:
        ranks.all_gather(0)  # by then every rank has read it
        if ranks.placement.rank == 0:
            # A file that could not be read is as old as ever when it can be again.
            shutil.rmtree(directory, ignore_errors=True)
        raise UserError(made.problem)
    return Samples(directory, made, id_type(tokenizer))


def _parts_of(source: SourceSettings, settings: Settings, use: Use, problems: list[str]) -> list[Part]:
    if settings.data.format == "jsonl":
        return list_parts(source.path, use, problems)
    if settings.data.trust_pickle:
        return list_blocks(source.path, problems)
    raise UserError("data.format cpm9g is read by unpickling: write data.trust_pickle: true if you trust the files")


def _key(
    settings: Settings, tokenizer: Tokenizer, by_source: list[list[Part]], listing: list[str], all_gather: AllGather
) -> str:
    """Return a name for what is to be encoded, having made sure that all ranks see the same files."""
    identities = [[part.identity for part in parts] for parts in by_source]
    what = [_FORMAT, tokenizer.identity, settings.task, settings.training.seq_len, identities]
    seen = _digest([*what, listing])
    changed = _digest([part.changed_ns for parts in by_source for part in parts])
    if len(set(all_gather(seen))) > 1:
        here = "".join(f"; here, {problem}" for problem in listing[:PROBLEMS_SHOWN])
        raise UserError(f"the ranks see different data: files or their sizes differ between the nodes{here}")
    # Copies on the nodes' own disks have times of their own: those of rank 0 count.
    return f"{seen:014x}{all_gather(changed)[0]:014x}"


def _digest(value: object) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(value).encode("ascii")).digest()[:7], "big")


def _encode(directory: Path, parts: list[Part], tokenizer: Tokenizer, task: str, ranks: Ranks) -> None:
    """Encode all parts on all ranks. Collective: no rank waits for another longer than a round takes."""
    total, done = _bytes_of(parts), 0
    ranks.tick(0, total)
    share = _encode_share(directory, parts, tokenizer, task, ranks.placement)
    while True:
        until = time.monotonic() + _SECONDS_A_ROUND
        for reached in share:
            done = reached
            if time.monotonic() >= until:
                break
        of_ranks = ranks.all_gather(_STOP if ranks.wants_to_stop() else done)
        if _STOP in of_ranks:
            raise Stopped
        ranks.tick(sum(of_ranks), total)
        if sum(of_ranks) == total:
            return


def _encode_share(
    directory: Path, parts: list[Part], tokenizer: Tokenizer, task: str, placement: Placement
) -> Iterator[int]:
    """Encode every world_size-th part unless an earlier attempt did; yields the bytes done so far, again and again."""
    done = 0
    for number in range(placement.rank, len(parts), placement.world_size):
        files = PartFiles(directory, number)
        if not files.found.exists():
            for _ in encode_part(parts[number], files, tokenizer, task):
                yield done
        done += parts[number].nbytes
        yield done


def _bytes_of(parts: list[Part]) -> int:
    return sum(part.nbytes for part in parts)


def _wait_for_parts(directory: Path, parts: list[Part], ranks: Ranks) -> list[Found]:
    """Return what the parts have, as soon as this node sees what other nodes have written."""
    files = [PartFiles(directory, number) for number in range(len(parts))]
    names = {file.found.name for file in files}
    total = _bytes_of(parts)
    _wait_until(lambda: names.issubset(os.listdir(directory)), lambda: ranks.tick(total, total))
    return [file.read_found() for file in files]


def _wait_until(condition: Callable[[], bool], alive: Callable[[], None]) -> None:
    """Ask again and again: joining many parts may take longer than a collective waits."""
    pause = 0.01
    while not condition():
        alive()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _summarise(
    directory: Path, by_source: list[list[Part]], found: list[Found], listing: list[str], settings: Settings
) -> Summary:
    problems = list(listing)
    remaining = iter(found)
    for source in by_source:
        rows_before: dict[str, int] = {}
        for part, has in zip(source, remaining):
            before = rows_before.get(part.file, 0)
            problems.extend(f"{part.place(row, before)}: {what}" for row, what in has.problems)
            rows_before[part.file] = before + has.rows
    if problems:
        return _unusable(list_problems(problems, len(listing) + sum(part.problem_count for part in found)))
    return _join(directory, by_source, found, settings)


def _join(directory: Path, by_source: list[list[Part]], found: list[Found], settings: Settings) -> Summary:
    """Write the table of all samples and return what there is."""
    seq_len, split = settings.training.seq_len, settings.task in _SPLIT_BY
    rows = sum(part.rows for part in found)
    tables = [
        _split(table, seq_len) if split else table[table["inputs"] <= seq_len]
        for table in (_table_of(PartFiles(directory, number)) for number in range(len(found)))
    ]
    per_part = [len(table) for table in tables]
    counts = iter(per_part)
    per_source = [sum(next(counts) for _ in source) for source in by_source]
    if not all(per_source):
        empty = by_source[per_source.index(0)]
        there = f"{empty[0].file} has none that does" if any(per_source) else f"none of the {rows} samples does"
        return _unusable(f"samples must fit into seq_len {seq_len} tokens, and {there}")
    table = np.concatenate(tables)
    write_atomically(directory / "samples.npy", lambda file: np.save(file, table))
    return Summary(
        problem=None,
        per_source=per_source,
        per_part=per_part,
        rows=rows,
        dropped=0 if split else rows - len(table),
        tokens=int(table["inputs"].sum(dtype=np.int64)),
        fingerprint=f"{_digest([per_part, split, seq_len, [part.digest for part in found]]):014x}",
    )


def _table_of(files: PartFiles) -> Table:
    lengths, loss_from = files.read_table()
    table = np.empty(len(lengths), dtype=_SAMPLE)
    table["start"] = np.cumsum(lengths, dtype=np.int64) - lengths
    table["inputs"] = lengths - 1
    table["loss_from"] = loss_from
    return table


def _split(table: Table, seq_len: int) -> Table:
    """Cut documents longer than ``seq_len`` inputs.

    Neighbouring pieces share one id, so that every id but ``<s>`` is a target once.
    """
    counts = -(-table["inputs"] // seq_len)
    pieces = np.repeat(table, counts)
    skipped = (np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    pieces["start"] += skipped
    pieces["loss_from"] = np.maximum(1, pieces["loss_from"] - skipped)
    pieces["inputs"] = np.minimum(pieces["inputs"] - skipped, seq_len)
    return pieces


def _unusable(problem: str) -> Summary:
    return Summary(problem, [], [], 0, 0, 0, "")


def _remove_others(directory: Path, use: Use) -> None:
    """Remove what was made of other data or settings."""
    for other in directory.parent.glob(f"{use}-*"):
        if other != directory:
            shutil.rmtree(other, ignore_errors=True)
