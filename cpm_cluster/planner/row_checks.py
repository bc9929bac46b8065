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
    "arch_kind": ("", "decoder", "glm", "t5", "bert"),
    "memory_metric": ("", "nvml", "reserved", "allocated", "unknown"),
}
ADAPTED = ("q", "k", "v", "o", "qkv", "gate", "up", "down", "lm_head", "embed_full", "head_full")
# Smallest and largest of each number; an empty cell is not stated.
RANGES = {
    **dict.fromkeys(("hidden", "layers", "heads", "kv_heads", "ffn", "vocab"), (1, 10_000_000)),
    **dict.fromkeys(("micro_batch", "grad_accum", "tp", "pp", "dp", "n_gpus", "n_nodes"), (1, 1 << 20)),
    "seq_len": (1, 1 << 24),
    "zero_stage": (0, 3),
    "lora_rank": (0, 100_000),
    "params_b": (1e-6, 1_000_000),
    **dict.fromkeys(("trainable_params", "bucket_elems", "max_live_params", "tokens_per_s_per_gpu"), (0, 10**15)),
    **dict.fromkeys(("gpu_mem_gb", "host_mem_gb", "gpu_mem_mb"), (0, 10**8)),
    "mfu": (0, 1),
}
FLAGS = """gated_mlp tied_embeddings offload_optimizer offload_param pin_memory zero_init overlap_comm flash_attn
gpu_censored use_gpu use_fit use_host use_time""".split()


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
    return rows, wrong


def findings(cells: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(column, what is wrong with it) of one row."""
    for column, known in KNOWN.items():
        if cells[column] not in known:
            yield column, f"{cells[column][:40]!r} is none of {', '.join(filter(None, known))}"
    for name in filter(None, cells["lora_targets"].split("+")):
        if name not in ADAPTED:
            yield "lora_targets", f"{name[:40]!r} is none of {', '.join(ADAPTED)}"
    for column in FLAGS:
        if cells[column] and _number(cells[column]) not in (0, 1):
            yield column, f"{cells[column][:40]!r} is neither 0 nor 1"
    numbers: dict[str, float] = {}
    for column, (least, most) in RANGES.items():
        text = cells[column]
        number = _number(text)
        if number is not None and least <= number <= most:
            numbers[column] = number
        elif text:
            yield column, f"{text[:40]} is out of range; write a number from {least:g} to {most:g}"
    yield from _needed(cells)
    yield from _together(numbers, cells.get("note", ""))


def _needed(cells: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The rest of a shape can be supposed from the number of parameters; the length of a sample cannot."""
    for column in ("hidden", "layers"):
        if not cells[column] and not cells["params_b"]:
            yield column, "is not stated, nor is params_b"
    if not cells["seq_len"]:
        yield "seq_len", "is not stated"


def _together(numbers: Mapping[str, float], note: str) -> Iterator[tuple[str, str]]:
    hidden, heads, kv_heads = (numbers.get(column) for column in ("hidden", "heads", "kv_heads"))
    if hidden and heads and hidden % heads and not re.search(r"head size \d+", note):
        yield "heads", f"{heads:g} heads do not divide hidden {hidden:g}; state a `head size` in the note"
    if heads and kv_heads and heads % kv_heads:
        yield "kv_heads", f"{kv_heads:g} key/value heads do not divide {heads:g} heads"
    gpus = numbers.get("n_gpus")
    product = math.prod(numbers.get(column, 1.0) for column in ("tp", "pp", "dp"))
    left_open = "dp" not in numbers or re.search(r"context[- ]parallel|\bCP\b", note)  # dp is what remains
    if gpus and gpus != product and not (gpus % product == 0 and left_open):
        yield "n_gpus", f"{gpus:g} GPUs, but tp × pp × dp is {product:g}"
    layers = numbers.get("layers")
    if layers and numbers.get("pp", 1) > layers:
        yield "pp", f"{numbers['pp']:g} pipeline stages for {layers:g} layers"
    if gpus and numbers.get("n_nodes", 1) > gpus:
        yield "n_nodes", f"{numbers['n_nodes']:g} nodes with {gpus:g} GPUs"


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
