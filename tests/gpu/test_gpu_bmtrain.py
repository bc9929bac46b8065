"""BMTrain with its own kernels and NCCL beside the torch engine; on CPUs a stand-in for CUDA does it (unit tests)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from trainings import Training

# fp16 weights and a scaled loss against fp32 weights under autocast; relative, of losses of some units.
TOLERANCE = 0.02
LOADS = "from cpm_cluster.training.engines.bmtrain_versions import import_bmtrain; import_bmtrain()"


@pytest.fixture
def bmtrain():
    """Skips where BMTrain, or the NCCL that it was built for, is not there."""
    if importlib.util.find_spec("bmtrain") is None:
        pytest.skip("BMTrain is not installed")
    done = subprocess.run([sys.executable, "-c", LOADS], stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        pytest.skip(done.stderr.strip().splitlines()[-1])


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("offload", [False, True], ids=["Adam", "AdamOffload"])
def test_losses_are_those_of_the_torch_engine(tmp_path, bmtrain, offload):
    training = {"steps": 20, "precision": "fp16", "recompute": "full"}
    own = {"zero_stage": 3, "offload_optimizer": offload}
    run = Training(tmp_path / "bmtrain", "gpu", {**training, **own}, engine="bmtrain")
    reference = Training(tmp_path / "torch", "gpu", training)

    run.run()
    reference.run()

    assert len(run.losses) == len(reference.losses) == 20
    assert run.losses == pytest.approx(reference.losses, rel=TOLERANCE)
    assert run.losses[-1] < run.losses[0]
    assert list(run.weights) == list(reference.weights)
