"""From what was asked for to what will run: a pure function of the job and a few facts of the submitter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cpm_cluster.launch.container import container
from cpm_cluster.launch.environment import environment
from cpm_cluster.launch.origins import set_by
from cpm_cluster.launch.plan import Container, LaunchPlan, Program, Setting
from cpm_cluster.launch.runtimes import pyxis
from cpm_cluster.launch.runtimes.docker import workdir_setting
from cpm_cluster.launch.slurm_options import batch_options, cpus_per_node, interactive_options, step_options
from cpm_cluster.launch.trainer import trainer_settings
from cpm_cluster.specs.checks.runtime import CONTAINER_RUNTIMES, runtime_obstacle
from cpm_cluster.specs.job import JobSpec

TRAINING_PACKAGE = "cpm_cluster.training"  # a program for each task


@dataclass(frozen=True)
class Submitter:
    """Facts of whoever submits. `user` is `uid:gid`; `python` is the interpreter that runs cpm-submit."""

    python: str
    user: str


def resolve(spec: JobSpec, run_id: str, run_dir: str, submitter: Submitter) -> LaunchPlan:
    """The plan of a job; `run_dir` is an absolute path that need not exist yet."""
    runtime = chosen_runtime(spec)
    box = None
    if spec.image is not None and runtime in CONTAINER_RUNTIMES:
        box = container(spec, spec.image, runtime, run_dir, submitter.user)
    workdir = spec.container.workdir or f"{run_dir}/code"
    workdir_set_by = set_by(spec, "container.workdir") if spec.container.workdir else "computed"
    slurm = spec.cluster.scheduler == "slurm"
    step, interactive = (step_options(spec), interactive_options(spec)) if slurm else ((), ())
    if box and runtime == "pyxis":
        step += tuple(pyxis.step_options(box.image, box.mounts, workdir, workdir_set_by))
        interactive += tuple(pyxis.shell_options(box.image, (m for m in box.mounts if m.source != run_dir)))
        if spec.container.workdir:
            interactive += (workdir_setting("container-workdir", workdir, workdir_set_by),)
    return LaunchPlan(
        run_id=run_id,
        run_dir=run_dir,
        job_name=spec.name,
        scheduler=spec.cluster.scheduler,
        runtime=runtime,
        nodes=spec.resources.nodes,
        gpus_per_node=spec.resources.gpus_per_node,
        time_limit_s=spec.time_limit_s,
        signal_lead_s=spec.signal_lead_s or spec.cluster.signal_lead_s,
        requeue=spec.cluster.requeue,
        batch=(Setting("job-name", spec.name, set_by(spec, "name")), *batch_options(spec, run_dir)) if slurm else (),
        step=step,
        interactive=interactive,
        modules=spec.cluster.runtimes[runtime].modules,
        conda_environment=spec.cluster.runtimes[runtime].environment,
        agent_python=pyxis.AGENT_PYTHON if runtime == "pyxis" else spec.cluster.python or submitter.python,
        container=box,
        program=_program(spec, runtime, run_dir, submitter),
        environment=environment(spec, f"{run_dir}/package"),
        secrets=spec.secrets,
        data_root=spec.cluster.runtimes[runtime].data_root,
        workdir=workdir,
        workdir_set_by=workdir_set_by,
        trainer=trainer_settings(spec, run_dir),
        warnings=(*spec.warnings, *_warnings(spec, runtime, box)),
    )


def chosen_runtime(spec: JobSpec) -> str:
    """The job's runtime, or the first of the cluster's that this job can use; checks saw that there is one."""
    return spec.runtime or next(name for name in spec.cluster.runtimes if runtime_obstacle(spec, name) is None)


def _warnings(spec: JobSpec, runtime: str, box: Container | None) -> Iterator[str]:
    """What only the plan shows."""
    if spec.cluster.scheduler == "slurm" and cpus_per_node(spec) is None:
        yield (
            "resources.cpus_per_node: neither the job nor the cluster file states CPUs; Slurm then gives one, unless"
            f" the site has a default (DefCpuPerGPU), to {spec.resources.ranks_per_node} rank(s) on a node"
        )
    for mount in box.mounts if box and runtime == "pyxis" else ():
        if not pyxis.is_mountable(mount):
            yield f"{mount.source}: pyxis cannot mount a path with a comma or a colon; rename it, or use docker"


def _program(spec: JobSpec, runtime: str, run_dir: str, submitter: Submitter) -> Program:
    ranks = spec.resources.ranks_per_node
    if spec.engine == "command":
        return Program("none", "", ranks, spec.command)
    python = "python3"
    if runtime == "bare":
        python = spec.cluster.runtimes[runtime].python or submitter.python
    return Program("torchrun", python, ranks, ("-m", f"{TRAINING_PACKAGE}.{spec.task}", f"{run_dir}/trainer.json"))
