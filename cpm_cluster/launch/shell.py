"""A shell on a node, in the surroundings of a job: what `cpm shell` asks for, and what it runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cpm_cluster.launch.plan import LaunchPlan, Program, options
from cpm_cluster.launch.resolve import Submitter, resolve
from cpm_cluster.launch.sbatch import agent_argv, load_modules
from cpm_cluster.specs.catalogue import Catalogue
from cpm_cluster.specs.checks.container import HIDDEN_BY_MOUNTS
from cpm_cluster.specs.checks.runtime import CONTAINER_RUNTIMES
from cpm_cluster.specs.compose import compose_job, layered, parse_override
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.nodes import MapNode, Node, ScalarNode, parse_yaml, read_yaml
from cpm_cluster.specs.problems import Location, Problem, SpecError, quoted

# That of the CPM-9G manual, which this verb stands for; where a cluster has containers and nobody names another.
DEFAULT_IMAGE = "cpmlive-flash:0.0.4"
# Options of the command line, and the keys of the job that they mean.
OPTIONS = {"--cluster": "cluster", "--image": "image", "--time": "time_limit"}
SHELL = b"{name: cpm, engine: command, command: [bash]}"
# srun gives the terminal to one node, and nothing waits for a warning before the time limit (Slurm takes 10 s or more).
ALWAYS = {"resources.nodes": "1", "signal_lead": "10s"}


def read_shell_job(
    profile: str, job: Path | None, asked: Mapping[str, str], sets: Sequence[str], catalogue: Catalogue, has_slurm: bool
) -> JobSpec:
    """The job whose surroundings the shell has.

    Args:
        profile: a resource profile, where `job` is None.
        job: a job file.
        asked: options of the command line, such as {"--cluster": "nine-g"}; they stand above the job.
        sets: texts of `--set`, above these.
        catalogue: where named configs are looked up.
        has_slurm: whether a job that names no cluster runs on Slurm.

    Raises:
        SpecError: everything that is wrong with it.
    """
    problems: list[Problem] = []
    below = _job_of(profile, problems) if job is None else read_yaml(job, "job", problems)
    if below is None:
        raise SpecError(problems)
    layers = [below, *(_layer(option, OPTIONS[option], text) for option, text in asked.items())]
    always = [f"{key}={value}" for key, value in ALWAYS.items()]
    layers += [node for text in (*sets, *always) if (node := parse_override(text, problems))]
    path, detected = job or Path("cpm shell"), "slurm" if has_slurm else "local"
    if _lacks_image(layered(layers), catalogue, detected, path.parent):
        layers.append(_layer("cpm shell", "image", DEFAULT_IMAGE))
    return compose_job(path, layers, catalogue, detected, problems)


def _job_of(profile: str, problems: list[Problem]) -> MapNode | None:
    """A job that is nothing but its resources."""
    job = parse_yaml(SHELL, "cpm shell", "cpm shell", problems)
    return job and layered([job, _layer("cpm shell", "profile", profile)])


def _layer(said_by: str, key: str, text: str) -> MapNode:
    where = Location(said_by)
    return MapNode({key: ScalarNode(text, True, where, said_by)}, where, said_by, {key: where})


def _lacks_image(job: MapNode, catalogue: Catalogue, detected: str, beside: Path) -> bool:
    """Whether nobody says anything of an image, and the job's runtime, or one of its cluster, needs one."""
    runtime, cluster = job.entries.get("runtime"), job.entries.get("cluster")
    if "image" in job.entries or (isinstance(runtime, ScalarNode) and runtime.text not in CONTAINER_RUNTIMES):
        return False
    if not isinstance(cluster, ScalarNode) or cluster.is_null:
        cluster = ScalarNode(detected, True, job.where, "detected")
    found = catalogue.load("clusters", cluster, "cluster", beside, problems=[])
    offered: Node | None = found.entries.get("runtimes") if found else None
    return isinstance(offered, MapNode) and any(name in CONTAINER_RUNTIMES for name in offered.entries)


def named(spec: JobSpec) -> str:
    """The name of a shell in the surroundings of a job; names have 64 characters at most."""
    return f"{spec.name[:58]}-shell"


def shell_plan(spec: JobSpec, run_id: str, folder: Path, submitter: Submitter) -> LaunchPlan:
    """The plan of a shell that begins in `folder`, which the container has under the same path.

    Its run directory is a hidden one in there, which need not exist yet, and is gone before the prompt appears.

    Raises:
        SpecError: the folder cannot be mounted.
    """
    here = str(folder)
    if spec.image is not None:
        _require_mountable(here)
        targets = [target.partition(":")[0] for target in spec.mounts.values()]
        if here not in targets:
            spec = replace(spec, mounts={**spec.mounts, here: here})
    spec = replace(spec, name=named(spec), container=replace(spec.container, workdir=here))
    plan = resolve(spec, run_id, f"{here.rstrip('/')}/.{run_id}", submitter)
    return replace(plan, program=Program("none", "", 1, ("bash",)), trainer=None, secrets=())


def _require_mountable(folder: str) -> None:
    what = None
    if folder in HIDDEN_BY_MOUNTS:
        what = f"the container has its own {folder}, so that yours cannot be there"
    elif any(c in folder for c in ',":'):
        what = f"the path {quoted(folder)} holds a comma, a colon or a double quote, and cannot be mounted"
    if what:
        where = Location("cpm shell")
        raise SpecError([Problem(where, "", f"{what}; run it in a folder of yours that the nodes see, too")])


def shell_command(plan: LaunchPlan) -> list[str]:
    """What `cpm shell` starts here: on Slurm srun, which gives the terminal to the shell's agent on the node.

    The job has the run's id for its name, so that it can be cancelled by it.
    """
    agent = agent_argv(plan)
    if plan.scheduler != "slurm":
        return agent
    if plan.modules:
        agent = ["bash", "-c", "\n".join([*load_modules(plan), 'exec "$@"']), "cpm-shell", *agent]
    ours = [f"--job-name={plan.run_id}", f"--task-epilog={epilog_file(plan)}"]
    return ["srun", *ours, *options(plan.interactive), "--pty", *agent]


def epilog_file(plan: LaunchPlan) -> str:
    """Where the task epilog lies."""
    return f"{plan.run_dir}/epilog"


def epilog_script(plan: LaunchPlan) -> str:
    """What Slurm runs on the node once the agent has ended: nothing, where the agent has cleaned up."""
    private = f'"${{TMPDIR:-/tmp}}"/{shlex.quote(plan.run_id)}'
    return f"#!/bin/sh\n[ -d {private} ] || exit 0\nexec {shlex.join([*agent_argv(plan), 'clean'])}\n"
