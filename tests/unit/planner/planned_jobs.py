"""Composed jobs whose figures can be counted, with the packaged models, GPUs and profiles."""

from __future__ import annotations

from pathlib import Path

from cpm_cluster.specs.catalogue import default_catalogue
from cpm_cluster.specs.compose import load_job
from cpm_cluster.specs.job import JobSpec

JOBS = Path(__file__).resolve().parents[3] / "jobs"
CATALOGUE = default_catalogue(Path("/nonexistent"), Path("/nonexistent"))
GIB = 1 << 30

# 10 × (4 × 2048² + 3 × 2048 × 8192 + 2 × 2048) + 2 × 4096 × 2048 + 2048: attention, SwiGLU, norms, embeddings, norm
N = 687_908_864
SMALL = """\
name: small
model: {layers: 10, hidden: 2048, heads: 16, ffn: 8192, vocab: 4096}
cluster: ./site.yaml
image: {tag: 'x:1', bmtrain: 1.0.1, deepspeed: 0.14.0}
data: {train: /data/rows.jsonl}
"""


def packaged(job: str, *overrides: str) -> JobSpec:
    """A job that ships with cpm-cluster, on Slurm where it names no cluster."""
    return load_job(JOBS / f"{job}.yaml", overrides, CATALOGUE, "slurm")


def small(folder: Path, *overrides: str, site: str = "gpu: a100-80g", gpus: int = 8, job: str = SMALL) -> JobSpec:
    """A job with a model of N parameters, at a Slurm site of which little is known."""
    offers = "scheduler: slurm\ndefault_time: 12h\nruntimes: {docker: {}, bare: {}}\n"
    (folder / "site.yaml").write_text(f"{offers}{site}\n", encoding="utf-8")
    path = folder / "job.yaml"
    path.write_text(job, encoding="utf-8")
    return load_job(path, (f"resources.gpus_per_node={gpus}", *overrides), CATALOGUE, "slurm")
