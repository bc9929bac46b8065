"""Jobs made ready as a submission makes them ready, without a run directory."""

from __future__ import annotations

from pathlib import Path

from cpm_cluster.launch.plan import LaunchPlan, NodeFacts
from cpm_cluster.launch.prepare import Prepared, prepare, read_job
from cpm_cluster.launch.resolve import Submitter
from cpm_cluster.launch.runtimes import run_argv, run_options
from cpm_cluster.specs.catalogue import default_catalogue

JOBS = Path(__file__).resolve().parents[3] / "jobs"
RUN_ID = "tune-20260102-030405-00ab"
RUN_DIR = Path("/shared/runs") / RUN_ID
SUBMITTER = Submitter(python="/opt/cpm/bin/python3", user="1000:1001")
NOWHERE = Path("/nonexistent")

# A site with a current Docker, InfiniBand and every runtime, of which nothing is assumed.
SITE = """\
scheduler: slurm
nodes: 4
gpus_per_node: 8
gpu: a100-80g
cpus_per_node: 128
memory_per_node: 1T
gpu_request: gpus-per-node
default_time: 12h
runtimes:
  docker-rootless: {version: 29.5.1}
  docker: {}
  podman: {}
  pyxis: {}
  conda: {environment: cpm-9g}
  bare: {python: /opt/torch/bin/python}
image_folder: /images
network: {socket_interfaces: "=ib0,ib1", infiniband: true, topology_file: /etc/nccl/topo.xml}
env: {NCCL_IB_TIMEOUT: 22, NCCL_DEBUG: INFO}
source: ours, for tests
"""

# A job that says no more than it must; tests add what they are about.
MINIMAL = """\
name: tune
model: {base: cpm-9g-8b, layers: 2}
cluster: ./site.yaml
resources: {gpus_per_node: 2, memory_per_node: 64G}
image: cpmlive-flash:0.0.4
engine: bmtrain
training: {precision: fp16}
data: {train: /data/rows.jsonl}
"""


def packaged(job: str, *overrides: str, run_dir: Path = RUN_DIR) -> Prepared:
    """A job that ships with cpm-cluster."""
    return _prepared(JOBS / f"{job}.yaml", overrides, run_dir)


def written(folder: Path, job: str, *overrides: str, site: str = SITE, run_dir: Path = RUN_DIR) -> Prepared:
    """A job as text, and the cluster file `./site.yaml` beside it."""
    (folder / "site.yaml").write_text(site, encoding="utf-8")
    path = folder / "job.yaml"
    path.write_text(job, encoding="utf-8")
    return _prepared(path, overrides, run_dir)


def _prepared(path: Path, overrides: tuple[str, ...], run_dir: Path) -> Prepared:
    spec = read_job(path, overrides, default_catalogue(NOWHERE, NOWHERE), has_slurm=True)
    return prepare(spec, RUN_ID, run_dir, SUBMITTER)


def node(plan: LaunchPlan, index: int = 0, name: str = "g2001") -> NodeFacts:
    """What the agent would find on a node of a plan."""
    return NodeFacts(
        name=name,
        index=index,
        job_id="4711",
        attempt=2,
        master_address="10.77.0.1",
        master_port="61175",
        gpu_uuids=tuple(f"GPU-{number:04x}" for number in range(plan.gpus_per_node)),
        environment_file=f"{plan.run_dir}/attempt-2/node-{index}/environment",
        container_id_file=f"{plan.run_dir}/attempt-2/node-{index}/container.id",
    )


def node_argv(plan: LaunchPlan, index: int = 0) -> list[str]:
    """The command line of one of its nodes."""
    return run_argv(plan, node(plan, index))


def options_of(plan: LaunchPlan, name: str) -> list[str | None]:
    """All values of one option that the runtime gets on a node."""
    return [setting.value for setting in run_options(plan, node(plan)) if setting.name == name]
