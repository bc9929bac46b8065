"""How long the planner takes in process: one plan, and a search over thousands of configurations.

    python benchmarks/planner_speed.py

Plans every packaged job, and searches around a LoRA run on a cluster of 8 nodes. Printed are medians over repetitions,
after one that is not counted: wall time, and the CPU time that other programs of the machine don't lengthen. The
targets are 5 ms for a plan and 1 s for a search over 2,000 configurations.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cpm_cluster.planner.answer import answer
from cpm_cluster.planner.suggest import suggest
from cpm_cluster.specs.catalogue import default_catalogue
from cpm_cluster.specs.compose import load_job
from cpm_cluster.specs.job import JobSpec

ROOT = Path(__file__).resolve().parent.parent
CATALOGUE = default_catalogue(Path("/nonexistent"), Path("/nonexistent"))
PLAN_MS, SEARCH_MS, CONFIGURATIONS = 5.0, 1000.0, 2000
SITE = """\
scheduler: slurm
nodes: 8
gpus_per_node: 8
gpu: a100-80g
memory_per_node: 1T
default_time: 24h
runtimes: {docker: {}}
"""
JOB = """\
name: search
model: cpm-9g-8b
method: {lora: {rank: 64}}
cluster: ./site.yaml
resources: {nodes: 4, gpus_per_node: 8}
image: {tag: 'x:1', torch: 2.7.1, deepspeed: 0.16.0}
engine: deepspeed
data: {train: /data/rows.jsonl}
training: {seq_len: 4096, micro_batch: 2, grad_accum: 16}
"""


def milliseconds(act: Callable[[], object], repetitions: int) -> tuple[float, float]:
    """Medians of wall and CPU time; the first repetition, which imports and fills caches, is not counted."""
    act()
    wall, cpu = [], []
    for _ in range(repetitions):
        started, used = time.perf_counter(), time.process_time()
        act()
        wall.append(1000 * (time.perf_counter() - started))
        cpu.append(1000 * (time.process_time() - used))
    return statistics.median(wall), statistics.median(cpu)


def searched_job() -> JobSpec:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "site.yaml").write_text(SITE, encoding="utf-8")
        path = Path(folder) / "job.yaml"
        path.write_text(JOB, encoding="utf-8")
        return load_job(path, (), CATALOGUE, "slurm")


def main() -> int:
    jobs = {path.stem: load_job(path, (), CATALOGUE, "slurm") for path in sorted((ROOT / "jobs").glob("*.yaml"))}
    slowest = 0.0
    for name, spec in jobs.items():
        wall, cpu = milliseconds(partial(answer, spec), 200)
        slowest = max(slowest, wall)
        print(f"plan {name:<22} {wall:8.2f} ms wall {cpu:8.2f} ms CPU  {answer(spec).verdict}")
    too_large = load_job(ROOT / "jobs/full_100b.yaml", ("profile=lora-100b-8x80g",), CATALOGUE, "slurm")
    wall, cpu = milliseconds(partial(answer, too_large), 20)
    proposals = len(answer(too_large).advice)
    print(f"plan with {proposals} proposals    {wall:8.2f} ms wall {cpu:8.2f} ms CPU  {answer(too_large).verdict}")
    spec = searched_job()
    wall, cpu = milliseconds(partial(suggest, spec), 10)
    found = suggest(spec)
    print(f"suggest                 {wall:8.2f} ms wall {cpu:8.2f} ms CPU  {found.considered:,} configurations")
    print(f"  {found.planned:,} of these planned one by one, the others ruled out by a smaller micro batch")
    print(f"  {len(found.options)} in the Pareto set")
    good = slowest <= PLAN_MS and wall <= SEARCH_MS and found.considered >= CONFIGURATIONS
    targets = f"{PLAN_MS:g} ms a plan, {CONFIGURATIONS:,} configurations in {SEARCH_MS:g} ms"
    print(f"targets ({targets}, wall): {'met' if good else 'MISSED'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
