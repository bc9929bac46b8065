"""A run that was stopped and goes on ends with the same bits, whatever was on a GPU: weights, moments, generators."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from trainings import Training

from cpm_cluster.training.engines.sharded_state import Stager

STEPS = {"cpu": 250, "gpu": 400}  # so many that a request to stop comes in time
LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ["project_q", "w_out"]}}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "place, method",
    [
        pytest.param("cpu", LORA, id="cpu-lora with dropout"),
        pytest.param("gpu", LORA, id="gpu-lora with dropout", marks=pytest.mark.gpu),
        pytest.param("gpu", "full", id="gpu-full", marks=pytest.mark.gpu),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, place, method):
    steps = STEPS[place]
    training = {
        "steps": steps,
        "precision": "bf16",
        "recompute": "full",
        "checkpoint": {"every": 50, "keep": 2, "asynchronous": True},
    }
    straight = Training(tmp_path / "straight", place, training, method=method, deterministic=True)
    stopped = Training(tmp_path / "stopped", place, training, method=method, deterministic=True)

    straight.run()
    stopped.start()
    stopped.stop_after(3)
    assert stopped.finish() == 85, stopped.log
    assert 3 <= len(stopped.losses) < steps
    stopped.run()

    assert stopped.losses == straight.losses and len(straight.losses) == steps
    assert len(set(straight.losses)) > steps / 2
    assert list(stopped.weights) == list(straight.weights)
    for name, weight in straight.weights.items():
        assert torch.equal(stopped.weights[name], weight), name


def test_what_is_staged_is_what_was_there_and_on_a_gpu_in_pinned_memory(tmp_path, place):
    device = torch.device("cuda" if place == "gpu" else "cpu")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        stager = Stager()
        tensors = {"a": torch.randn(512, 513, device=device), "b": torch.randn(7, device=device).bfloat16()}
        before = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        stager.stage(tensors)
        for tensor in tensors.values():
            tensor.zero_()  # what training does next must not reach the copies
        copies = {index.fqn: copy for index, copy in stager._copies.items()}
    finally:
        dist.destroy_process_group()

    assert copies.keys() == before.keys()
    for name, copy in copies.items():
        assert torch.equal(copy, before[name]) and copy.device.type == "cpu"
        assert copy.is_pinned() == (place == "gpu")
