"""Renderings for Slurm: the batch script, and the lines that one types to work by hand.

Values come from the plan, quoted once, here; everything else is constant text. The node agent does on each node
what `# Every node runs` shows.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

import cpm_cluster
from cpm_cluster.launch.plan import LaunchPlan, Setting, option, options
from cpm_cluster.launch.runtimes import SYMBOLIC_NODE, run_argv, shell_argv
from cpm_cluster.specs.problems import printable

_STRICT = "set -euo pipefail"

_SCRUB = """\
# What the submitting shell may hold of these would mislead torchrun and BMTrain.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE NODE_RANK MASTER_ADDR MASTER_PORT"""

_MODULES = """\
if ! type module >/dev/null 2>&1 && [ -r /etc/profile.d/modules.sh ]; then
    # shellcheck source=/dev/null
    . /etc/profile.d/modules.sh
fi"""

# The port lies above Linux's ephemeral range (as enroot chooses it); a requeued job takes the next one.
_RENDEZVOUS = """\
# All nodes meet at the first one, by an address that this host resolves once.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
CPM_MASTER_ADDR=$(getent ahostsv4 "$first_node" | awk 'NR == 1 { print $1 }')
CPM_MASTER_PORT=$((61000 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 4536))
export CPM_MASTER_ADDR CPM_MASTER_PORT
if [ -z "$CPM_MASTER_ADDR" ]; then
    echo "cpm: $first_node has no address here; check /etc/hosts or DNS on this node" >&2
    exit 1
fi"""

_ATTEMPT = """\
attempt=1
while [ -e "$run_dir/attempt-$attempt" ]; do
    attempt=$((attempt + 1))
done
mkdir "$run_dir/attempt-$attempt"
export CPM_ATTEMPT=$attempt"""

# `wait` returns early when a signal is trapped, and a bare `wait` would hide the step's exit code.
_RUN = """\
trap : TERM USR2
"${step[@]}" "${agent[@]}" &
step_pid=$!
code=0
while kill -0 "$step_pid" 2>/dev/null; do
    code=0
    wait "$step_pid" || code=$?
done"""

_REQUEUE = """\
if [ "$code" -eq 85 ]; then
    echo "cpm: stopped with a checkpoint before the time limit; the job goes on when it is scheduled again"
    scontrol requeue "$SLURM_JOB_ID"
fi"""

_RESUBMIT = """\
if [ "$code" -eq 85 ]; then
    echo "cpm: stopped with a checkpoint before the time limit; this site does not requeue, so a new job goes on"
    sbatch --dependency="afterany:$SLURM_JOB_ID" "$run_dir/job.sbatch"
fi"""


_LIST_GPUS = "GPU_UUIDS=$(nvidia-smi --query-gpu=uuid --format=csv,noheader | paste -sd,)"


def batch_script(plan: LaunchPlan) -> str:
    """The script that `sbatch` takes; a node's command line is in it as a comment."""
    parts = [
        "\n".join(["#!/bin/bash", *_heading(plan), *_directives(plan)]),
        _STRICT,
        f"run_dir={shlex.quote(plan.run_dir)}",
        _SCRUB,
        *_modules(plan),
        _RENDEZVOUS,
        _ATTEMPT,
        "\n".join([_array("agent", agent_argv(plan)), _array("step", step_argv(plan))]),
        _RUN,
        _REQUEUE if plan.requeue else _RESUBMIT,
        'exit "$code"',
    ]
    return "\n\n".join(parts) + "\n"


def agent_argv(plan: LaunchPlan) -> list[str]:
    """The node agent; it runs from the copy in the run directory, so that an upgrade does not touch a queued job."""
    return [plan.agent_python, f"{plan.run_dir}/package", plan.run_dir]


def step_argv(plan: LaunchPlan) -> list[str]:
    """The srun of the batch script, without the program."""
    return ["srun", *options(plan.step)]


def by_hand(plan: LaunchPlan) -> list[str]:
    """What to type for a shell in the same surroundings: srun, module load, docker load, docker run."""
    lines = []
    if plan.scheduler == "slurm":
        lines.append(shown(["srun", *options(plan.interactive), "--pty", "bash"]))
    if plan.modules:
        lines.append(shown(["module", "load", *plan.modules]))
    if plan.container and plan.runtime != "pyxis":
        if plan.container.archive:
            lines.append(shown([plan.runtime.split("-")[0], "load", "--input", plan.container.archive.path]))
        if plan.gpus_per_node:
            lines.append(_LIST_GPUS)
    return [*lines, " ".join(map(_typed, shell_argv(plan, SYMBOLIC_NODE)))]


def _typed(word: str) -> str:
    """A word of a command line; the one place where the typing shell shall fill in something."""
    return word.replace('"', '\\"').join('""') if "$GPU_UUIDS" in word else shown([word])


def shown(argv: Sequence[str]) -> str:
    """An argv on one line, quoted for a shell and safe for a terminal or a comment."""
    return printable(shlex.join(argv))


def wrapped(argv: Sequence[str]) -> list[str]:
    """As `shown`, an option a line, continued with backslashes."""
    lines: list[list[str]] = [[]]
    for before, word in zip(["--", *argv], argv, strict=False):
        if word.startswith("-") or before.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    texts = [shown(words) for words in lines if words]
    return [text + " \\" for text in texts[:-1]] + texts[-1:]


def _heading(plan: LaunchPlan) -> Iterator[str]:
    yield f"# {printable(plan.job_name)}: written by cpm-cluster {cpm_cluster.__version__}"
    yield "#"
    yield f"# Every node runs, held by the node agent ({plan.runtime}):"
    yield from (f"#   {line}" for line in wrapped(run_argv(plan, SYMBOLIC_NODE)))
    if plan.container and plan.container.archive:
        yield f"# after loading {printable(plan.container.archive.path)} where the image is missing"


def _directives(plan: LaunchPlan) -> Iterator[str]:
    for setting in plan.batch:
        yield f"#SBATCH {_directive(setting)}"


def _directive(setting: Setting) -> str:
    text = option(setting)
    if text.split() != [text] or not text.isprintable() or any(c in text for c in "\"'\\#"):
        raise ValueError(f"{setting.name} cannot be written as a directive: {printable(text)}")
    return text


def _modules(plan: LaunchPlan) -> list[str]:
    if not plan.modules:
        return []
    return [_MODULES + "\n" + shlex.join(["module", "load", *plan.modules])]


def _array(name: str, argv: Sequence[str]) -> str:
    words = "\n".join(f"    {shlex.quote(word)}" for word in argv)
    return f"{name}=(\n{words}\n)"
