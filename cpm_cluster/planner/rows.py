"""Tables of measured runs: one Setup and what was read, for each row."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from cpm_cluster.planner.setup import Engine, Kind, Metric, Mode, Recompute, Setup, Shape

Outcome = Literal["ok", "oom_gpu", "oom_host"]

# Name in configs/gpus.yaml and usable MiB (NVML's total), by (gpu, gpu_mem_gb).
CARDS: Mapping[tuple[str, int], tuple[str, int]] = {
    ("V100", 0): ("v100-32g", 0),  # of a size that is not stated: it decides no speed
    ("V100", 16): ("v100-16g", 16160),
    ("V100", 32): ("v100-32g", 32510),
    ("V100PCIe", 16): ("v100-pcie-16g", 16160),
    ("V100PCIe", 32): ("v100-pcie-32g", 32510),
    ("T4", 16): ("t4-16g", 15109),
    ("TitanRTX", 24): ("titanrtx-24g", 24220),
    ("A100", 40): ("a100-40g", 40536),
    ("A100", 80): ("a100-80g", 81251),
    ("A800", 80): ("a800-80g", 81251),
    ("A100PCIe", 40): ("a100-pcie-40g", 40536),
    ("A100PCIe", 80): ("a100-pcie-80g", 80994),
    ("A30", 24): ("a30-24g", 24258),
    ("P40", 24): ("p40-24g", 22919),
    ("RTX2080Ti", 11): ("rtx2080ti-11g", 11019),
    ("RTX3090", 24): ("rtx3090-24g", 24268),
    ("RTX3090Ti", 24): ("rtx3090ti-24g", 24564),
    ("RTX4090", 24): ("rtx4090-24g", 24564),
    ("RTX4080", 16): ("rtx4080-16g", 16376),
    ("RTX4070TiSuper", 16): ("rtx4070tisuper-16g", 16376),
    ("RTX5090", 32): ("rtx5090-32g", 32607),
    ("A6000", 48): ("rtxa6000-48g", 49140),
    ("A5000", 24): ("rtxa5000-24g", 24256),
    ("RTX6000Ada", 48): ("rtx6000ada-48g", 49140),
    ("RTXPro6000", 96): ("rtxpro6000-96g", 97887),
    ("A10", 24): ("a10-24g", 22731),
    ("A10G", 24): ("a10g-24g", 23028),
    ("A40", 48): ("a40-48g", 46068),
    ("L4", 24): ("l4-24g", 23034),
    ("L40", 48): ("l40-48g", 46068),
    ("L40S", 48): ("l40s-48g", 46068),
    ("H20", 96): ("h20-96g", 97871),
    ("H100", 80): ("h100-80g", 81559),
    ("H100", 96): ("h100-96g", 97871),
    ("H100PCIe", 80): ("h100-pcie-80g", 81559),
    ("H100NVL", 94): ("h100-nvl-94g", 95830),
    ("GH200", 96): ("gh200-96g", 97871),
    ("H800", 80): ("h800-80g", 81559),
    ("H200", 141): ("h200-141g", 143771),
    ("B200", 180): ("b200-180g", 183359),
}
# Where the card is not in the table: below what NVML says of any. The least is the T4's, 15109 of 16 GB with ECC on.
MIB_PER_NOMINAL_GB = 940
USUAL_ASPECT = 128  # hidden / layers, where a row states the number of parameters alone (GPT-3, Brown et al. 2020)
USUAL_HEAD = 128
USUAL_VOCABULARY = 32000


@dataclass(frozen=True)
class Reading:
    """What was measured; None where nothing was."""

    outcome: Outcome
    gpu_memory_mib: float | None
    gpu_censored: bool  # the cache had filled the card: the need is at most this
    host_memory_gb: float | None  # of an oom_host: the limit that was exceeded
    tokens_per_s_per_gpu: float | None
    mfu: float | None


@dataclass(frozen=True)
class Row:
    """One configuration that somebody ran, and what it is good for."""

    id: str
    model: str
    source: str
    note: str
    setup: Setup
    reading: Reading
    use_gpu: bool
    use_fit: bool
    use_host: bool
    use_time: bool


class RowError(ValueError):
    """A table that cannot be read: `file:line: column: what`."""


def read_rows(path: Path) -> list[Row]:
    """All rows of a CSV file.

    Raises:
        RowError: for a missing column, or a value that is not of its column's type.
        OSError: where the file cannot be read.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = []
        for record in reader:
            try:
                rows.append(row_of(record))
            except KeyError as error:
                raise RowError(f"{path}:1: there is no column {error.args[0]}") from None
            except ValueError as error:
                raise RowError(f"{path}:{reader.line_num}: {error}") from None
        return rows


def row_of(record: Mapping[str, str]) -> Row:
    """One row. Raises KeyError for a missing column, ValueError for a wrong value."""
    cells = _Cells(record)
    reading = Reading(
        outcome=cast(Outcome, cells.text("outcome")),
        gpu_memory_mib=cells.number("gpu_mem_mb"),
        gpu_censored=cells.flag("gpu_censored"),
        host_memory_gb=cells.number("host_mem_gb"),
        tokens_per_s_per_gpu=cells.number("tokens_per_s_per_gpu"),
        mfu=cells.number("mfu"),
    )
    return Row(
        id=cells.text("id"),
        model=cells.text("model"),
        source=cells.text("source"),
        note=cells.text("note"),
        setup=_setup(cells),
        reading=reading,
        use_gpu=cells.flag("use_gpu"),
        use_fit=cells.flag("use_fit"),
        use_host=cells.flag("use_host"),
        use_time=cells.flag("use_time"),
    )


class _Cells:
    """The cells of a row by column. Empty means not stated."""

    def __init__(self, record: Mapping[str, str]) -> None:
        self.record = record

    def text(self, column: str) -> str:
        return self.record[column] or ""

    def number(self, column: str) -> float | None:
        text = self.text(column)
        try:
            return float(text) if text else None
        except ValueError:
            raise ValueError(f"{column}: {text[:40]!r} is not a number") from None

    def whole(self, column: str, otherwise: int = 0) -> int:
        number = self.number(column)
        return otherwise if number is None else round(number)

    def flag(self, column: str) -> bool:
        return self.whole(column) == 1


def _shape(cells: _Cells) -> Shape:
    parameters = round((cells.number("params_b") or 0) * 1e9)
    hidden, layers = _size(parameters, cells.whole("hidden"), cells.whole("layers"))
    heads = cells.whole("heads") or max(1, round(hidden / USUAL_HEAD))
    gated = cells.flag("gated_mlp")
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=cells.whole("kv_heads") or heads,
        ffn=cells.whole("ffn") or (8 * hidden // 3 if gated else 4 * hidden),
        vocab=cells.whole("vocab") or USUAL_VOCABULARY,
        gated_mlp=gated,
        tied_embeddings=cells.flag("tied_embeddings"),
        kind=cast(Kind, cells.text("arch_kind") or "decoder"),
        head_dim=_stated(r"head size (\d+)", cells.text("note"), 0),
        parameters_stated=parameters,
    )


def _size(parameters: int, hidden: int, layers: int) -> tuple[int, int]:
    """(hidden, layers); what a row doesn't state follows from 12 layers × hidden² parameters and the usual aspect."""
    if not hidden and not layers:
        layers = max(1, round((parameters / (12 * USUAL_ASPECT**2)) ** (1 / 3)))
    hidden = hidden or max(1, round(math.sqrt(parameters / (12 * layers))))
    return hidden, layers or max(1, round(parameters / (12 * hidden**2)))


def _setup(cells: _Cells) -> Setup:
    note, version = cells.text("note"), cells.text("engine_version")
    oom_host = cells.text("outcome") == "oom_host"
    nominal_gb = cells.whole("gpu_mem_gb")
    gpu, memory_mib = CARDS.get((cells.text("gpu"), nominal_gb), ("", nominal_gb * MIB_PER_NOMINAL_GB))
    gpus, tp, pp = (cells.whole(column, 1) for column in ("n_gpus", "tp", "pp"))
    dp = cells.whole("dp") or max(1, gpus // (tp * pp))
    return Setup(
        shape=_shape(cells),
        mode=cast(Mode, cells.text("mode")),
        lora_rank=cells.whole("lora_rank"),
        lora_targets=tuple(filter(None, cells.text("lora_targets").split("+"))),
        trained_parameters_stated=cells.whole("trainable_params"),
        engine=cast(Engine, cells.text("engine")),
        engine_version=version,
        zero_stage=cells.whole("zero_stage"),
        offload_optimizer=cells.flag("offload_optimizer"),
        offload_param=cells.flag("offload_param"),
        pin_memory=cells.flag("pin_memory"),
        zero_init=cells.text("zero_init") != "0",
        loads_half="loaded in half precision" in note,
        bucket_elements=cells.whole("bucket_elems"),
        max_live_params=cells.whole("max_live_params"),
        overlap_comm=cells.flag("overlap_comm"),
        precision=cells.text("precision"),
        optimizer=cells.text("optimizer") or "adamw",
        micro_batch=cells.whole("micro_batch", 1),
        grad_accum=cells.whole("grad_accum", 1),
        grad_accum_stated=cells.number("grad_accum") is not None,
        seq_len=cells.whole("seq_len", 1),
        mean_tokens=_stated(r"mean (\d+) tokens", note, 0),
        recompute=cast(Recompute, cells.text("recompute") or "none"),
        flash_attention=cells.flag("flash_attn"),
        sequence_parallel="sequence parallel" in note,
        fused_cross_entropy="chunked cross entropy" in note or _chunks_its_loss(version),
        cut_cross_entropy="cut cross entropy" in note,
        compiled="torch.compile" in note,
        tp=tp,
        pp=pp,
        dp=dp,
        context_parallel=_context_parallel(note, gpus, tp * pp * dp),
        virtual_stages=max(1, _stated(r"interleaved pipeline, (\d+) chunks", note, 1)),
        embeddings_count_as_layers="embeddings count as layers" in note,
        shard_within_node="HSDP" in note,
        nodes=cells.whole("n_nodes", 1),
        gpu=gpu,
        gpu_memory_mib=memory_mib,
        host_memory_gb=(cells.number("host_mem_gb") or 0.0) if oom_host else 0.0,
        metric=cast(Metric, cells.text("memory_metric") or "unknown"),
    )


def _chunks_its_loss(version: str) -> bool:
    """Programs whose loss is chunked (litgpt, torchtune) or a fused kernel (llm-foundry's fused_crossentropy)."""
    return version.startswith(("litgpt", "torchtune", "Composer"))


def _context_parallel(note: str, gpus: int, others: int) -> int:
    """Context parallelism has no column: it is what is left of the GPUs, and stated in the note."""
    return max(1, gpus // others) if others and re.search(r"context[- ]parallel|\bCP\b", note) else 1


def _stated(pattern: str, note: str, otherwise: int) -> int:
    """A number without a column, from the note."""
    match = re.search(pattern, note)
    return int(match.group(1)) if match else otherwise
