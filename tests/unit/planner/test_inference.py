"""Tasks evaluate and generate: the model for reading alone, a cache or logits, and no states of training."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned_jobs import GIB, SMALL, N, packaged, small

from cpm_cluster.planner.answer import answer
from cpm_cluster.planner.fit import Demand
from cpm_cluster.planner.inference import NO_TIME
from cpm_cluster.specs.job import JobSpec

READING = SMALL.replace("data: {train: /data/rows.jsonl}", "engine: torch\ninit_from: /w.pt")
GENERATE = READING + "task: generate\ngeneration: {prompts: /p.jsonl, batch: 4}\ntraining: {seq_len: 1024}\n"
EVALUATE = READING + "task: evaluate\ndata: {eval: /e.jsonl}\ntraining: {seq_len: 1024, micro_batch: 2}\n"


def demand(spec: JobSpec, resource: str) -> Demand:
    (found,) = [demand for demand in answer(spec).demands if demand.resource == resource]
    return found


def sizes(spec: JobSpec, resource: str = "GPU memory") -> dict[str, int]:
    return {component.name: component.bytes for component in demand(spec, resource).components}


def test_the_cache_is_of_all_tokens_at_once_and_the_weights_are_in_half(tmp_path: Path) -> None:
    parts = sizes(small(tmp_path, "training.zero_stage=0", job=GENERATE))
    assert parts["weights"] == 2 * N
    assert parts["key/value cache"] == 2 * 2 * 10 * 2048 * 4 * 1024
    assert not parts.keys() & {"Adam moments", "gradients", "trained weights", "logits"}


def test_sharded_weights_are_gathered_a_few_blocks_at_a_time(tmp_path: Path) -> None:
    parts = sizes(small(tmp_path, "training.zero_stage=3", job=GENERATE))
    assert parts["weights"] == 2 * N // 8
    assert parts["gathered embeddings"] == 2 * 2 * 4096 * 2048
    assert parts["gathered blocks"] == pytest.approx(3 * 2 * (N - 2 * 4096 * 2048) / 10, rel=1e-3)
    assert sizes(small(tmp_path, "training.zero_stage=2", job=GENERATE))["gathered weights"] == 2 * N


def test_an_adapter_is_beside_the_weights_and_sharded_as_they_are(tmp_path: Path) -> None:
    lora = "method: {lora: {rank: 8, init_from: /adapter, targets: [project_q, w_out]}}\n"
    adapter = 8 * 10 * ((2048 + 2048) + (8192 + 2048))
    changes = [f"training.zero_stage={stage}" for stage in (0, 2, 3)]
    whole, gathered, sharded = (sizes(small(tmp_path, change, job=GENERATE + lora)) for change in changes)
    assert whole["weights"] == 2 * N and whole["adapter"] == 2 * adapter
    assert gathered["adapter"] == sharded["adapter"] == 2 * adapter // 8
    assert gathered["gathered weights"] == 2 * (N + adapter)
    without = sizes(small(tmp_path, changes[2], job=GENERATE))
    assert sharded["gathered blocks"] == pytest.approx(without["gathered blocks"] + 3 * 2 * adapter / 10, abs=1)
    assert sharded["weights"] == without["weights"] and "adapter" not in without
    assert whole["one block"] > sizes(small(tmp_path, changes[0], job=GENERATE))["one block"]


def test_evaluation_has_logits_of_every_token_and_no_cache(tmp_path: Path) -> None:
    parts = sizes(small(tmp_path, "training.zero_stage=0", job=EVALUATE))
    assert parts["logits"] == 2 * 4096 * 2 * 1024 + 8 * 4096 * 1024
    assert "key/value cache" not in parts


def test_a_torch_that_maps_no_files_reads_all_weights_on_every_rank(tmp_path: Path) -> None:
    old, new = (
        sizes(small(tmp_path, f"image.torch={version}", job=GENERATE), "host memory") for version in ("1.13.1", "2.6.0")
    )
    assert old["weights as they are read"] == 8 * 2 * N
    assert "weights as they are read" not in new


def test_without_gpus_the_model_is_in_the_memory_of_the_node(tmp_path: Path) -> None:
    changes = ("resources.processes_per_node=2", "training.precision=fp32", "training.zero_stage=0")
    parts = sizes(small(tmp_path, *changes, gpus=0, job=GENERATE), "host memory")
    assert parts["weights"] == 2 * 4 * N


def test_no_time_and_no_checkpoints_are_planned(tmp_path: Path) -> None:
    fit = answer(small(tmp_path, job=EVALUATE))
    assert fit.time is None and fit.notes == (NO_TIME,)
    assert "disk" not in [demand.resource for demand in fit.demands]


@pytest.mark.parametrize("job", ["evaluate_10b", "generate_10b", "evaluate_100b", "generate_100b"])
def test_the_packaged_jobs_fit(job: str) -> None:
    assert answer(packaged(job)).verdict == "fits"


def test_100b_does_not_fit_a_gpu_unsharded() -> None:
    spec = packaged("generate_100b", "training.zero_stage=0")
    assert demand(spec, "GPU memory").bytes > 180 * GIB
    assert answer(spec).verdict == "does not fit"
