"""Training of a model of a billion parameters on one GPU, in bf16: what the planner said of the job, and what came.

    python benchmarks/gpu_train.py [--gpu NAME] [--json FILE]

The same job runs twice through `cpm-submit` on this machine, without and with recomputed activations: rows of 2048
tokens, packed from the corpus that ships with Python, random weights. Printed are

* speed: MFU and tokens/s of the last twenty steps, as the trainer records them (metrics.jsonl);
* memory: what tensors took and what torch held for them at their highest, and what nvidia-smi showed while it trained
  beyond what it showed before (telemetry of the run), each beside `cpm plan` of the same job, uncalibrated.

It needs 20 GB of disk for a while: a run ends with a checkpoint and its weights. --gpu is the card's name in gpus.yaml,
where that is not the one that name and memory suggest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from launch_overhead import machine, verdict

import cpm_cluster
from cpm_cluster.agent.gpu_query import GpuQuery
from cpm_cluster.planner.answer import answer
from cpm_cluster.planner.fit import Fit
from cpm_cluster.planner.job_setup import job_setup
from cpm_cluster.runs.records import read_lines
from cpm_cluster.runs.telemetry import run_telemetry
from cpm_cluster.specs.catalogue import default_catalogue
from cpm_cluster.specs.compose import load_job
from cpm_cluster.specs.fields import Reading, Section
from cpm_cluster.specs.gpu import Gpu
from cpm_cluster.specs.job import JobSpec

MIB, GIB = 1 << 20, 1 << 30
RECOMPUTE = ("none", "full")
MICRO_BATCHES = (4, 2, 1)
# The agent takes a sample every ten seconds; an MFU is of twenty steps.
SECONDS, FEWEST_STEPS, MOST_STEPS = 40.0, 40, 400
MEMORY_OFF_BY = 0.25  # beyond the planner's interval
SANE_MFU = (0.05, 0.8)
AMPERE = 80
SAME_CARD = 0.05  # drivers and ECC take some of the memory
JOB: dict[str, Any] = {
    "cluster": "local",
    "engine": "torch",
    "task": "pretrain",
    "method": "full",
    "model": {"layers": 20, "hidden": 2048, "heads": 16, "ffn": 5504, "vocab": 32000},
    "tokenizer": "python-reference",
    "data": {"train": "builtin:python-reference"},
}
TRAINING: dict[str, Any] = {
    "seq_len": 2048,
    "lr": 3e-4,
    "schedule": "constant",
    "warmup_steps": 10,
    "precision": "bf16",
    "zero_stage": 0,
    "log_every": 1,
    "eval_every": 0,
}
# In a process of its own: one that has touched a GPU holds half a GiB of it.
DEVICE = """\
import json, torch
from cpm_cluster.training.model.attention import Demands, choose_kernel
card = torch.cuda.get_device_properties(0)
kernel = choose_kernel("auto", Demands(torch.device("cuda", 0), torch.bfloat16, 128, False))
print(json.dumps({
    "name": card.name,
    "sm": 10 * card.major + card.minor,
    "memory_mib": card.total_memory >> 20,
    "uuid": str(getattr(card, "uuid", "")),
    "attention": kernel.name,
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
}))
"""


def device() -> dict[str, Any] | None:
    """The first GPU as torch sees it; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    done = subprocess.run([sys.executable, "-c", DEVICE], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def card_named(found: Mapping[str, Any], cards: Mapping[str, Gpu]) -> str | None:
    """The name in gpus.yaml of what torch calls `NVIDIA A100-SXM4-80GB`; None where no card is like it."""
    shown = re.sub(r"[^a-z0-9]", "", found["name"].lower())
    alike = {
        name: abs(card.memory_mib - found["memory_mib"]) / card.memory_mib
        for name, card in cards.items()
        if card.sm == found["sm"] and name.partition("-")[0] in shown
    }
    name = min(alike, key=lambda name: alike[name], default=None)
    return name if name is not None and alike[name] <= SAME_CARD else None


def packaged_cards() -> dict[str, Gpu]:
    """gpus.yaml."""
    nodes = default_catalogue(Path("/nonexistent"), Path("/nonexistent")).gpus([])
    return {name: Section(Gpu).read(node, "", Reading([])) for name, node in nodes.items()}


def jobs(gpu: str | None, attention: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Those of the two that fit; long enough, as far as the planner knows, for the agent to see them at their fullest.

    The micro batch is halved until the planner does not say that it is too large.
    """
    for recompute in RECOMPUTE:
        for micro_batch in MICRO_BATCHES:
            job = job_of(gpu, recompute=recompute, attention=attention, micro_batch=micro_batch, steps=FEWEST_STEPS)
            fit = answer(spec_of(job, folder))
            if fit.does_not_fit:
                continue
            if fit.time is not None:
                job["training"]["steps"] = min(MOST_STEPS, max(FEWEST_STEPS, round(SECONDS / fit.time.step.seconds)))
            yield job
            break


def job_of(gpu: str | None, **training: Any) -> dict[str, Any]:
    """A job file as a mapping."""
    resources = {"gpus_per_node": 1, **({"gpu": gpu} if gpu else {})}
    name = f"recompute-{training['recompute']}"
    return {**JOB, "name": name, "resources": resources, "training": {**TRAINING, **training}}


def spec_of(job: Mapping[str, Any], folder: Path) -> JobSpec:
    """The composed job, of packaged configs alone."""
    path = folder / f"{job['name']}.yaml"
    path.write_text(yaml.safe_dump(dict(job)), encoding="utf-8")
    return load_job(path, (), default_catalogue(folder, folder), "local")


def measure(job: dict[str, Any], folder: Path, uuid: str = "") -> dict[str, Any]:
    """Run a job to its end and return its figures beside those planned.

    Raises:
        RuntimeError: it failed; with what cpm-submit and the ranks said.
    """
    training = job["training"]
    job = {**job, "training": {**training, "checkpoint": {"every": training["steps"], "keep": 1}}}
    spec = spec_of(job, folder)
    before = used_mib(GpuQuery(()), uuid) if spec.resources.gpus_per_node else 0
    run = run_to_its_end(folder / f"{spec.name}.yaml", folder / "runs" / spec.name)
    rows = read_lines(run / "metrics.jsonl")
    telemetry = run_telemetry(run / "telemetry") or {}
    shown = [gpu["used_mib"] for gpu in telemetry.get("gpus", ()) if uuid in ("", gpu["uuid"])]
    host = telemetry.get("host")
    last, setup = rows[-1], job_setup(spec)
    return {
        "recompute": spec.training.recompute,
        "attention": spec.training.attention,
        "micro_batch": spec.training.micro_batch,
        "seq_len": spec.training.seq_len,
        "parameters": setup.shape.parameters if setup else None,
        "steps": last["step"],
        "first_loss": rows[0]["loss"],
        "last_loss": last["loss"],
        "step_s": last["step_seconds"],
        "tokens_per_s": last["tokens_per_second"],
        "mfu": last["mfu"],
        "allocated_bytes": last["memory_allocated_bytes"],
        "reserved_bytes": last["memory_reserved_bytes"],
        "nvml_bytes": max(0, round(max(shown) - before) * MIB) if shown else None,
        "nvml_before_bytes": round(before * MIB),
        "host_bytes": host["rss_bytes"] if host else None,
        "planned": planned(answer(spec)),
    }


def run_to_its_end(job: Path, runs_dir: Path) -> Path:
    """Submit a job and return its run directory."""
    environment = {**os.environ, "CPM_RUNS_DIR": str(runs_dir)}
    argv = [str(Path(sys.executable).parent / "cpm-submit"), str(job)]
    done = subprocess.run(argv, env=environment, cwd=job.parent, capture_output=True, text=True)
    if done.returncode != 0:
        logs = "".join(path.read_text("utf-8", "replace")[-4000:] for path in runs_dir.glob("*/attempt-*/*/*.log"))
        raise RuntimeError(f"cpm-submit ended with {done.returncode}: {done.stdout}{done.stderr}{logs}")
    (run,) = (path.parent for path in runs_dir.glob("*/metrics.jsonl"))
    return run


def used_mib(query: GpuQuery, uuid: str) -> float:
    """What nvidia-smi shows as used of one GPU, or of the fullest."""
    query.ask()
    while (found := query.answer()) is None:
        time.sleep(0.05)
    return max((gpu["memory_used_mib"] or 0 for gpu in found if uuid in ("", gpu["uuid"])), default=0)


def planned(fit: Fit) -> dict[str, Any]:
    """What the planner says of memory and time: bytes, seconds."""
    step = fit.time.step if fit.time else None
    return {
        "memory": {
            demand.resource: {
                "bytes": demand.bytes,
                "low_bytes": demand.low_bytes,
                "high_bytes": demand.high_bytes,
                "instant": demand.instant,
                "parts": {part.name: part.bytes for part in demand.components},
            }
            for demand in fit.demands
        },
        "step_s": step.seconds if step else None,
        "low_step_s": step.low if step else None,
        "high_step_s": step.high if step else None,
        "tokens_per_s": step.tokens_per_second_per_gpu if step else None,
        "mfu": step.mfu if step else None,
    }


def judged(run: dict[str, Any]) -> dict[str, Any]:
    """The figures with whether they are as wanted: the loss falls, the MFU is sane, the memory about as planned."""
    memory = run["planned"]["memory"].get("GPU memory")
    used, mfu = run["nvml_bytes"], run["mfu"]
    as_planned = None
    if memory and used:
        as_planned = memory["low_bytes"] * (1 - MEMORY_OFF_BY) <= used <= memory["high_bytes"] * (1 + MEMORY_OFF_BY)
    wanted = {
        "loss_falls": run["last_loss"] < run["first_loss"],
        "mfu_is_sane": None if mfu is None else SANE_MFU[0] <= mfu <= SANE_MFU[1],
        "memory_is_as_planned": as_planned,
    }
    return {**run, "wanted": wanted, "as_wanted": all(value is not False for value in wanted.values())}


def all_figures(folder: Path, found: dict[str, Any], gpu: str | None) -> dict[str, Any]:
    """Both runs, and what they ran on."""
    gpu = gpu or card_named(found, packaged_cards())
    uuid = f"GPU-{found['uuid']}" if found["uuid"] else ""
    runs = [judged(measure(job, folder, uuid)) for job in jobs(gpu, found["attention"], folder)]
    shown = {key: value for key, value in found.items() if key != "uuid"}
    versions = {"cpm-cluster": cpm_cluster.__version__, "driver": driver()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": {**shown, "planned_as": gpu},
        **versions,
        **machine(),
        "runs": runs,
    }


def driver() -> str | None:
    """The version of the NVIDIA driver."""
    argv = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def table(figures: dict[str, Any]) -> Iterator[str]:
    """The figures for people."""
    gpu = figures["gpu"]
    card = gpu["planned_as"] or "nothing in gpus.yaml: --gpu NAME"
    yield f"{gpu['name']} (planned as {card}), torch {gpu['torch']}"
    for run in figures["runs"]:
        yield ""
        yield from lines(run)


def lines(run: dict[str, Any]) -> Iterator[str]:
    """One run: measured, then planned."""
    plan, memory = run["planned"], run["planned"]["memory"].get("GPU memory")
    batch = f"{run['micro_batch']} × {run['seq_len']} tokens"
    yield (
        f"recompute {run['recompute']}, attention {run['attention']}, {run['parameters'] / 1e9:.2f}B, {batch},"
        f" {run['steps']} steps: loss {run['first_loss']:.3f} to {run['last_loss']:.3f}{verdict(run)}"
    )
    yield f"  MFU          {percent(run['mfu'])}   planned {percent(plan['mfu'])}"
    yield f"  tokens/s     {run['tokens_per_s']:,.0f}   planned {number(plan['tokens_per_s'])}"
    steps = f"{number(plan['low_step_s'], '.3f')} to {number(plan['high_step_s'], '.3f')}"
    yield f"  step         {run['step_s']:.3f} s   planned {number(plan['step_s'], '.3f')} s ({steps})"
    ends = f"{gib(memory['low_bytes'])} to {gib(memory['high_bytes'])}" if memory else "-"
    yield f"  nvidia-smi   {gib(run['nvml_bytes'])}   planned {gib(memory and memory['bytes'])} ({ends})"
    yield f"  torch        {gib(run['allocated_bytes'])} allocated, {gib(run['reserved_bytes'])} reserved at most"


def gib(size: float | None) -> str:
    return f"{size / GIB:.2f} GiB" if size else "-"


def percent(share: float | None) -> str:
    return f"{share:.1%}" if share is not None else "-"


def number(value: float | None, how: str = ",.0f") -> str:
    return format(value, how) if value is not None else "-"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", help="the card's name in gpus.yaml")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    found = device()
    if found is None:
        print("skipped: torch sees no GPU")
        return 0
    if found["sm"] < AMPERE:
        print(f"skipped: bf16 needs sm_{AMPERE} or newer, {found['name']} is sm_{found['sm']}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        figures = all_figures(Path(folder), found, options.gpu)
    if not figures["runs"]:
        print(f"skipped: {found['name']} has no room for a model of this size")
        return 0
    print("\n".join(table(figures)))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if all(run["as_wanted"] for run in figures["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
