"""benchmarks/gpu_train.py: speed and memory of a training on one GPU beside what was planned."""

from __future__ import annotations

import json
from pathlib import Path

import gpu_train
import pytest
import torch

RESULTS = Path(gpu_train.__file__).parent / "results/gpu_train.json"


@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_a_billion_parameters_learn_at_a_sane_speed_in_about_the_memory_that_was_planned(tmp_path, capsys):
    written = tmp_path / "figures.json"
    with capsys.disabled():
        print()
        code = gpu_train.main(["--json", str(written)])
    if not written.exists():
        pytest.skip("this GPU cannot train it, as printed")

    RESULTS.write_text(written.read_text())
    figures = json.loads(written.read_text())
    assert figures["gpu"]["name"] and figures["runs"]
    for run in figures["runs"]:
        assert run["nvml_bytes"] > run["reserved_bytes"] >= run["allocated_bytes"] > 0
        assert all(value is not False for value in run["wanted"].values()), run
    assert code == 0


def test_the_same_way_with_a_tiny_model_on_a_cpu(tmp_path, monkeypatch, capsys):
    job = gpu_train.job_of(None, recompute="full", attention="sdpa", micro_batch=2, steps=20)
    job["resources"] = {"gpus_per_node": 0, "processes_per_node": 1, "cpus_per_node": 1}
    job["model"] = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 128, "vocab": 2048}
    job["training"] |= {"seq_len": 128, "lr": 3e-3}
    device = {"name": "none", "sm": 90, "memory_mib": 1, "uuid": "", "attention": "sdpa", "torch": torch.__version__}
    monkeypatch.setattr(gpu_train, "device", lambda: device)
    monkeypatch.setattr(gpu_train, "jobs", lambda gpu, attention, folder: iter([job]))

    assert gpu_train.main(["--json", str(tmp_path / "figures.json")]) == 0

    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["gpu"]["name"] == "none" and figures["gpu"]["planned_as"] is None and figures["cpus"] > 0
    (run,) = figures["runs"]
    assert run["steps"] == 20 and run["wanted"]["loss_falls"] and run["as_wanted"]
    assert run["tokens_per_s"] > 0 and run["step_s"] > 0
    assert [run[key] for key in ("mfu", "allocated_bytes", "reserved_bytes", "nvml_bytes")] == [None] * 4
    assert run["planned"]["memory"]["host memory"]["bytes"] > 0 and run["planned"]["step_s"] is None
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("none (planned as nothing in gpus.yaml") and shown[2].startswith("recompute full")
    assert "NOT AS WANTED" not in shown[2] and shown[3] == "  MFU          -   planned -"


def test_a_run_that_fails_says_why(tmp_path):
    job = gpu_train.job_of(None, recompute="none", attention="auto", micro_batch=1, steps=20)
    job["resources"] = {"gpus_per_node": 0, "processes_per_node": 1}
    job["init_from"] = "/nowhere/weights.pt"
    with pytest.raises(RuntimeError, match=r"cpm-submit ended with \d+.*/nowhere/weights\.pt"):
        gpu_train.measure(job, tmp_path)


class TestPlannedBeside:
    """The figures of a GPU, as they would come."""

    def figures(self, tmp_path, **measured):
        (job, _) = gpu_train.jobs("h100-80g", "varlen", tmp_path)
        fit = gpu_train.planned(gpu_train.answer(gpu_train.spec_of(job, tmp_path)))
        size = fit["memory"]["GPU memory"]["bytes"]
        run = {
            "recompute": "none",
            "attention": "varlen",
            "micro_batch": job["training"]["micro_batch"],
            "seq_len": 2048,
            "parameters": 1_140_000_000,
            "steps": job["training"]["steps"],
            "first_loss": 10.4,
            "last_loss": 5.0,
            "step_s": 0.18,
            "tokens_per_s": 45_000.0,
            "mfu": 0.34,
            "allocated_bytes": size - (3 << 30),
            "reserved_bytes": size - (1 << 30),
            "nvml_bytes": size,
            "planned": fit,
        }
        return gpu_train.judged({**run, **measured})

    def test_as_planned(self, tmp_path):
        run = self.figures(tmp_path)
        assert run["as_wanted"] and set(run["wanted"].values()) == {True}
        shown = list(gpu_train.lines(run))
        assert shown[1].startswith("  MFU          34.0%   planned ") and "%" in shown[1][25:]
        assert " to " in shown[4] and "GiB" in shown[4]

    @pytest.mark.parametrize(
        "measured, what",
        [
            ({"last_loss": 10.5}, "loss_falls"),
            ({"mfu": 0.01}, "mfu_is_sane"),
            ({"mfu": 0.95}, "mfu_is_sane"),
            ({"nvml_bytes": 10 << 30}, "memory_is_as_planned"),
            ({"nvml_bytes": 70 << 30}, "memory_is_as_planned"),
        ],
    )
    def test_not_as_wanted(self, tmp_path, measured, what):
        run = self.figures(tmp_path, **measured)
        assert not run["as_wanted"] and run["wanted"][what] is False
        assert "NOT AS WANTED" in next(gpu_train.lines(run))


@pytest.mark.parametrize(
    "name, sm, memory_mib, card",
    [
        ("NVIDIA A100-SXM4-80GB", 80, 81153, "a100-80g"),
        ("NVIDIA A800-SXM4-80GB", 80, 81153, "a800-80g"),
        ("NVIDIA H100 80GB HBM3", 90, 81089, "h100-80g"),
        ("NVIDIA H200", 90, 143156, "h200-141g"),
        ("NVIDIA H20", 90, 97260, "h20-96g"),
        ("NVIDIA GeForce RTX 4090", 89, 24210, "rtx4090-24g"),
        ("NVIDIA H100 NVL", 90, 95320, "h100-nvl-94g"),
        ("NVIDIA L4", 89, 22563, "l4-24g"),
        ("NVIDIA B200", 100, 182642, "b200-180g"),
        ("NVIDIA B300", 103, 275040, None),
    ],
)
def test_the_card_is_found_in_the_catalogue(name, sm, memory_mib, card):
    found = {"name": name, "sm": sm, "memory_mib": memory_mib}
    assert gpu_train.card_named(found, gpu_train.packaged_cards()) == card


def test_a_card_with_too_little_memory_gets_smaller_batches_or_none(tmp_path):
    small = [job["training"]["micro_batch"] for job in gpu_train.jobs("a100-40g", "varlen", tmp_path)]
    assert small and all(micro_batch <= 4 for micro_batch in small)
    assert list(gpu_train.jobs("rtx4090-24g", "varlen", tmp_path)) == []
