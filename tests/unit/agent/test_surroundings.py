"""What the agent finds on its node."""

from __future__ import annotations

import pytest

from cpm_cluster.agent import surroundings
from cpm_cluster.agent.surroundings import (
    NodeError,
    gpu_uuids,
    inherited_environment,
    next_attempt,
    node_facts,
    secret_values,
)


@pytest.fixture
def secrets(tmp_path):
    path = tmp_path / "secrets.env"
    path.write_text("# mine\nTOKEN=a=b,c $HOME \nEMPTY=\nOTHER=x\n")
    path.chmod(0o600)
    return path


def test_only_the_named_secrets_are_read(secrets):
    assert secret_values(("TOKEN", "EMPTY"), secrets) == {"TOKEN": "a=b,c $HOME ", "EMPTY": ""}
    assert secret_values((), secrets.parent / "nowhere") == {}


def test_secrets_that_are_missing_are_named_and_their_values_are_not(secrets):
    with pytest.raises(NodeError, match=r"secrets\.env has no line for KEY, MINE$"):
        secret_values(("TOKEN", "KEY", "MINE"), secrets)
    with pytest.raises(NodeError, match="secrets TOKEN: .*nowhere: No such file or directory; write NAME=VALUE"):
        secret_values(("TOKEN",), secrets.parent / "nowhere")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_secrets_that_others_can_read_are_refused(secrets, mode):
    secrets.chmod(mode)
    with pytest.raises(NodeError, match=f"readable by others .mode {mode:o}.; chmod 600 it"):
        secret_values(("TOKEN",), secrets)


def test_what_another_launcher_left_does_not_mislead_ours():
    kept = {"HOME": "/h", "SLURM_JOB_ID": "1", "CUDA_VISIBLE_DEVICES": "0"}
    misleading = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "x", "PET_NNODES": "2", "TORCHELASTIC_RUN_ID": "x"}
    assert inherited_environment({**kept, **misleading, "PYTHONPATH": "/old", "SUBMITIT_EXECUTOR": "local"}) == kept


def test_a_node_of_slurm_and_one_that_stands_alone(made_run):
    files = made_run().run.files
    slurm = {"SLURM_NODEID": "2", "SLURMD_NODENAME": "g2003", "SLURM_JOB_ID": "9", "CPM_ATTEMPT": "4"}
    node = node_facts(files, {**slurm, "CPM_MASTER_ADDR": "10.0.0.1", "CPM_MASTER_PORT": "61009"})
    assert (node.name, node.index, node.job_id, node.attempt) == ("g2003", 2, "9", 4)
    assert (node.master_address, node.master_port) == ("10.0.0.1", "61009")
    assert (files.root / "attempt-4/node-2").is_dir()

    alone = node_facts(files, {})
    assert (alone.index, alone.attempt, alone.master_address) == (0, 5, "127.0.0.1")
    assert 1024 <= int(alone.master_port) < 65536


def test_attempts_are_counted_by_their_folders(made_run):
    files = made_run().run.files
    assert next_attempt(files) == 1
    for name in ("attempt-1", "attempt-10", "attempt-x"):
        (files.root / name).mkdir()
    assert next_attempt(files) == 11


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A stand-in that prints what a test wants."""

    def install(output, code=0):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")

    return install


LISTED = (
    "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-aa-0)\n  MIG 1g.10gb Device 0: (UUID: MIG-x)\nGPU 1: A100 (UUID: GPU-bb-1)"
)


def test_gpus_are_known_by_their_uuids(made_run, nvidia_smi):
    nvidia_smi(LISTED)
    assert gpu_uuids(made_run(gpus_per_node=2).run.plan, "g2001") == ("GPU-aa-0", "GPU-bb-1")


def test_a_step_that_does_not_have_its_gpus_is_refused(made_run, nvidia_smi):
    nvidia_smi(LISTED)
    with pytest.raises(NodeError, match="lists 2 GPUs in this step, the plan has 8: a GPU has failed, or Slurm"):
        gpu_uuids(made_run(gpus_per_node=8).run.plan, "g2001")
    nvidia_smi("NVIDIA-SMI has failed", code=9)
    with pytest.raises(NodeError, match="nvidia-smi -L fails on g2001"):
        gpu_uuids(made_run("a-20260102-030405-0001", gpus_per_node=8).run.plan, "g2001")


def test_without_gpus_nobody_is_asked(made_run, monkeypatch):
    monkeypatch.setattr(surroundings.subprocess, "run", None)
    assert gpu_uuids(made_run().run.plan, "g2001") == ()
