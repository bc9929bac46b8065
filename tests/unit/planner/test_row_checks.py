"""Tables of measured runs: a row that describes no run is named with its line and column, and the others are read."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from cpm_cluster.planner.row_checks import read_table
from cpm_cluster.planner.rows import RowError

COLUMNS = """\
id model params_b hidden layers heads kv_heads ffn vocab gated_mlp tied_embeddings arch_kind mode lora_rank lora_targets
trainable_params engine engine_version zero_stage offload_optimizer offload_param pin_memory zero_init bucket_elems
max_live_params overlap_comm precision optimizer micro_batch grad_accum seq_len recompute flash_attn tp pp dp n_gpus
n_nodes gpu gpu_mem_gb memory_metric outcome gpu_mem_mb gpu_censored host_mem_gb tokens_per_s_per_gpu mfu use_gpu
use_fit use_host use_time source note""".split()
STATED = """\
id=mine hidden=4096 layers=32 heads=32 ffn=11008 vocab=32000 mode=lora lora_rank=8 lora_targets=q+v engine=deepspeed
precision=bf16 seq_len=2048 tp=1 pp=1 dp=8 n_gpus=8 n_nodes=1"""
GOOD = dict.fromkeys(COLUMNS, "") | dict(cell.split("=") for cell in STATED.split())


def table(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**GOOD, **row} for row in rows)
    return path


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ({"layers": "0"}, "layers: 0 is out of range"),
        ({"hidden": "inf"}, "hidden: inf is out of range"),
        ({"hidden": ""}, "hidden: is not stated, nor is params_b"),
        ({"params_b": "7B"}, "params_b: 7B is out of range"),
        ({"host_mem_gb": "inf"}, "host_mem_gb: inf is out of range"),
        ({"use_fit": "yes"}, "use_fit: 'yes' is neither 0 nor 1"),
        ({"memory_metric": "smi"}, "memory_metric: 'smi' is none of nvml"),
        ({"arch_kind": "mamba"}, "arch_kind: 'mamba' is none of decoder"),
        ({"pp": "64", "dp": "1", "n_gpus": "64"}, "pp: 64 pipeline stages for 32 layers"),
        ({"seq_len": "1000000000000000000"}, "seq_len: 1000000000000000000 is out of range"),
        ({"micro_batch": "-1"}, "micro_batch: -1 is out of range"),
        ({"heads": "33"}, "heads: 33 heads do not divide hidden 4096"),
        ({"kv_heads": "5"}, "kv_heads: 5 key/value heads do not divide 32 heads"),
        ({"tp": "3"}, "n_gpus: 8 GPUs, but tp × pp × dp is 24"),
        ({"n_nodes": "9"}, "n_nodes: 9 nodes with 8 GPUs"),
        ({"engine": "magic"}, "engine: 'magic' is none of bmtrain, deepspeed"),
        ({"precision": "fp7"}, "precision: 'fp7' is none of"),
        ({"lora_targets": "q+nose"}, "lora_targets: 'nose' is none of"),
    ],
)
def test_what_describes_no_run_is_named_and_the_other_rows_are_read(
    cells: dict[str, str], told: str, tmp_path: Path
) -> None:
    rows, (wrong, *_) = read_table(table(tmp_path, {}, cells, {"id": "third"}))
    assert [row.id for row in rows] == ["mine", "third"]
    assert f"rows.csv:3: {told}" in wrong


def test_context_parallelism_and_odd_heads_are_taken_from_the_note(tmp_path: Path) -> None:
    notes = ({"dp": "4", "note": "context parallel 2"}, {"heads": "30", "kv_heads": "30", "note": "head size 128"})
    assert read_table(table(tmp_path, *notes))[1] == []


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.csv").write_text("id,engine\n1,none\n")
    for name, told in (("a.csv", "is no table"), ("b.csv", "there is no column")):
        with pytest.raises(RowError, match=told):
            read_table(tmp_path / name)
