"""Rows that describe no run: found before they are predicted, with their line and column."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from cpm_cluster.planner.rows import Row, RowError, row_of
from cpm_cluster.planner.setup import HALF, QUANTISED

KNOWN = {
    "engine": ("bmtrain", "deepspeed", "fsdp", "ddp", "megatron", "none"),
    "mode": ("full", "lora", "qlora", "reward", "infer"),
    "recompute": ("", "none", "selective", "full"),
    "outcome": ("", "ok", "oom_gpu", "oom_host"),
    "precision": ("", "fp32", *HALF, *QUANTISED),
}
ADAPTED = ("q", "k", "v", "o", "qkv", "gate", "up", "down", "lm_head", "embed_full", "head_full")
# Smallest and largest of what is a count; an empty cell is not stated.
COUNTS = {
    **dict.fromkeys(("hidden", "layers", "heads", "kv_heads", "ffn", "vocab"), (1, 10_000_000)),
    **dict.fromkeys(("micro_batch", "grad_accum", "tp", "pp", "dp", "n_gpus", "n_nodes"), (1, 1 << 20)),
    "seq_len": (1, 1 << 24),
    "zero_stage": (0, 3),
    "lora_rank": (0, 100_000),
}
NEEDED = ("hidden", "layers", "heads", "ffn", "vocab", "seq_len")


def read_table(path: Path) -> tuple[list[Row], list[str]]:
    """The rows that describe a run, and what is wrong with the others: `file:line: column: what`.

    Raises:
        RowError: for a missing column, and a file that is no text.
        OSError: where the file cannot be read.
    """
    rows: list[Row] = []
    wrong: list[str] = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            for record in reader:
                where = f"{path}:{reader.line_num}"
                cells = {column: text or "" for column, text in record.items() if column}
                found = [f"{where}: {column}: {what}" for column, what in findings(cells)]
                wrong += found
                if not found:
                    rows.append(row_of(cells))
        except KeyError as error:
            raise RowError(f"{path}:1: there is no column {error.args[0]}") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise RowError(f"{path}: is no table: {error}") from None
        except ValueError as error:
            raise RowError(f"{path}:{reader.line_num}: {error}") from None
    return rows, wrong


def findings(cells: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(column, what is wrong with it) of one row."""
    for column, known in KNOWN.items():
        if cells[column] not in known:
            yield column, f"{cells[column][:40]!r} is none of {', '.join(filter(None, known))}"
    for name in filter(None, cells["lora_targets"].split("+")):
        if name not in ADAPTED:
            yield "lora_targets", f"{name[:40]!r} is none of {', '.join(ADAPTED)}"
    numbers: dict[str, float] = {}
    for column, (least, most) in COUNTS.items():
        text = cells[column]
        if not text and column in NEEDED:
            yield column, "is not stated"
        elif text:
            number = _number(text)
            if number is None or not least <= number <= most:
                yield column, f"{text[:40]} is out of range; write a number from {least} to {most}"
            else:
                numbers[column] = number
    yield from _together(numbers, cells.get("note", ""))


def _together(numbers: Mapping[str, float], note: str) -> Iterator[tuple[str, str]]:
    hidden, heads, kv_heads = (numbers.get(column) for column in ("hidden", "heads", "kv_heads"))
    if hidden and heads and hidden % heads and not re.search(r"head size \d+", note):
        yield "heads", f"{heads:g} heads do not divide hidden {hidden:g}; state a `head size` in the note"
    if heads and kv_heads and heads % kv_heads:
        yield "kv_heads", f"{kv_heads:g} key/value heads do not divide {heads:g} heads"
    gpus = numbers.get("n_gpus")
    ways = [numbers.get(column, 1.0) for column in ("tp", "pp", "dp")]
    product = math.prod(ways)
    if gpus and gpus != product and not (gpus % product == 0 and re.search(r"context[- ]parallel|\bCP\b", note)):
        yield "n_gpus", f"{gpus:g} GPUs, but tp × pp × dp is {product:g}"
    if gpus and numbers.get("n_nodes", 1) > gpus:
        yield "n_nodes", f"{numbers['n_nodes']:g} nodes with {gpus:g} GPUs"


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
