"""Pretend GPUs in containers: podman's list of devices, and the stand-in for NVIDIA's hook."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from string import Template

import pytest

from cpm_cluster.sandbox import podman, slurm_conf
from cpm_cluster.sandbox.gpus import gpu_uuid
from cpm_cluster.sandbox.state import Sandbox

STATE = Sandbox()


def test_every_pretend_gpu_is_a_device_of_its_own():
    devices = podman.devices(STATE)["devices"]
    assert [device["name"] for device in devices] == [gpu_uuid(node, i) for node in STATE.nodes for i in range(8)]


def test_a_device_brings_the_device_node_of_its_gpu_alone():
    device = podman.devices(STATE)["devices"][8 + 3]
    mounts = [(mount["hostPath"], mount["containerPath"]) for mount in device["containerEdits"]["mounts"]]
    path = str(STATE.nodes[1].devices[3])
    assert mounts == [(path, path), (path, "/dev/nvidia3")]


def test_any_device_brings_an_nvidia_smi():
    mounts = podman.devices(STATE)["containerEdits"]["mounts"]
    assert "/usr/bin/nvidia-smi" in [mount["containerPath"] for mount in mounts]


@pytest.fixture
def hook(tmp_path):
    """Run the hook for a container with this NVIDIA_VISIBLE_DEVICES, on a node with GPUs 0 and 1."""
    table = tmp_path / "gpus.txt"
    table.write_text(f"{socket.gethostname()} 0 GPU-a /dev/null\nelsewhere 0 GPU-z /dev/null\n")
    text = (slurm_conf.templates() / "containers" / "nvidia-container-runtime-hook").read_text()
    program = tmp_path / "hook"
    program.write_text(Template(text).substitute(gpu_table=table, bin=tmp_path))

    def run(visible, stage="prestart"):
        config = {"process": {"env": ["A=b=c", f"NVIDIA_VISIBLE_DEVICES={visible}"]}, "root": {"path": "rootfs"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        state = json.dumps({"pid": 0, "bundle": str(tmp_path)})
        return subprocess.run([sys.executable, program, stage], input=state, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("visible", ["GPU-z", "GPU-a,GPU-z", "7"])
def test_the_hook_refuses_a_gpu_that_the_node_has_not(hook, visible):
    done = hook(visible)
    assert done.returncode == 1
    assert done.stderr == f"nvidia-container-cli: device error: {visible.split(',')[-1]}: unknown device\n"


@pytest.mark.parametrize("visible", ["", "void", "none"])
def test_the_hook_leaves_a_container_without_gpus_alone(hook, visible):
    done = hook(visible)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_hook_does_nothing_at_other_stages(hook):
    assert hook("GPU-z", stage="poststop").returncode == 0
