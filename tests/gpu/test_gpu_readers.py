"""What asks nvidia-smi reads a true one's answers; without a GPU, a stand-in gives answers like those of an A100."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

import pytest

from cpm_cluster.agent import preflight
from cpm_cluster.agent.gpu_query import GpuQuery
from cpm_cluster.agent.surroundings import gpu_uuids
from cpm_cluster.launch.plan import LaunchPlan, NodeFacts
from cpm_cluster.launch.resolve import Submitter, resolve
from cpm_cluster.specs.catalogue import default_catalogue, packaged_jobs
from cpm_cluster.specs.compose import load_job

UUID = "GPU-5cf4a7a1-3b5c-4a3b-9d0e-2f1d7c9b8a60"
STAND_IN = f"""\
#!/bin/sh
case "$1" in
    -L) echo 'GPU 0: NVIDIA A100-SXM4-80GB (UUID: {UUID})' ;;
    --query-gpu=uuid,*) echo '{UUID}, 1024, 81920, 0, 34, 61.52, 0' ;;
    --query-gpu=driver_version) echo 535.104.05 ;;
    --query-gpu=compute_cap) echo 8.0 ;;
    --query-compute-apps=*) ;;
    *) exit 6 ;;
esac
"""


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def nvidia_smi(request, tmp_path, monkeypatch):
    """A true one, or a script in its place."""
    if request.param == "gpu":
        return
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


@pytest.fixture
def plan(tmp_path, nvidia_smi) -> LaunchPlan:
    """A job in a container on all GPUs of this machine."""
    listed = preflight._nvidia_smi("-L") if shutil.which("nvidia-smi") else []
    count = sum(line.startswith("GPU ") for line in listed or ())
    catalogue = default_catalogue(tmp_path, tmp_path)
    spec = load_job(packaged_jobs() / "lora_10b.yaml", [f"resources.gpus_per_node={count}"], catalogue, "slurm")
    return resolve(spec, "run", str(tmp_path), Submitter("python3", "0:0"))


def test_the_gpus_are_listed_and_asked_for_in_numbers(plan):
    uuids = gpu_uuids(plan, "here")
    assert len(uuids) == plan.gpus_per_node >= 1 and all(uuid.startswith("GPU-") for uuid in uuids)

    query = GpuQuery(uuids)
    query.ask()
    while (found := query.answer()) is None:
        time.sleep(0.02)

    assert not query.problem and [gpu["uuid"] for gpu in found] == list(uuids)
    for gpu in found:
        assert 0 <= gpu["memory_used_mib"] <= gpu["memory_total_mib"] and gpu["memory_total_mib"] > 1000
        assert 0 <= gpu["utilisation_percent"] <= 100 and 0 < gpu["temperature_c"] < 120
        assert gpu["power_w"] is None or 0 < gpu["power_w"] < 2000  # some cards do not tell
        assert gpu["ecc_uncorrected"] is None or gpu["ecc_uncorrected"] >= 0


def test_preflight_understands_driver_processes_and_compute_capability(plan):
    node = NodeFacts("here", 0, "1", 1, "127.0.0.1", "29500", gpu_uuids(plan, "here"), "", "")
    (driver, *_) = preflight._nvidia_smi("--query-gpu=driver_version") or [""]
    (capability, *_) = preflight._nvidia_smi("--query-gpu=compute_cap") or [""]
    assert len(preflight._numbers(driver)) >= 2, driver
    sm = int(capability.replace(".", ""))
    box = plan.container
    assert box is not None and 30 <= sm < 200
    fits = replace(plan, container=replace(box, min_driver=driver, sm=(sm,), ptx=None))
    too_old = replace(plan, container=replace(box, min_driver="9999.1", sm=(sm - sm % 10 - 10,), ptx=None))

    def of_gpus(which: LaunchPlan) -> list[str]:
        return [f.text for f in preflight.preflight(which, node, {}) if f.check in ("gpus", "driver")]

    others = [text for text in of_gpus(fits) if "is on GPU" in text]  # true ones may have company
    assert of_gpus(fits) == others
    told = " ".join(of_gpus(too_old))
    assert f"its NVIDIA driver is {driver.strip()}" in told and f"its GPUs are sm_{sm}" in told
