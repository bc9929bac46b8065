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
# What the submitting shell may hold of these would mislead torchrun and BMTrain, or keep srun from handing on ours.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE NODE_RANK MASTER_ADDR MASTER_PORT SLURM_EXPORT_ENV"""

_MODULES = """\
# Before strict mode, which the set-up of many module systems does not survive.
if ! type module >/dev/null 2>&1; then
    for setup in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh; do
        # shellcheck source=/dev/null
        if [ -r "$setup" ]; then . "$setup"; break; fi
    done
fi
"""

_MODULE_MISSING = """\
 || {
    echo "cpm: a module cannot be loaded on ${SLURMD_NODENAME:-this node}, see above (modules in the cluster file)" >&2
    exit 1
}"""

_ONE_NODE = """\
# All ranks are on this node, which an older rootless Docker reaches by no other address.
export CPM_MASTER_ADDR=127.0.0.1"""

_SEVERAL_NODES = """\
# All nodes meet at the first one, by an address that it resolves once: its own names for itself do not count.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\\n'*}
CPM_MASTER_ADDR=$(getent ahostsv4 "$first_node" | awk '$1 !~ /^127\\./ && !found++ { print $1 }') || :
if [ -z "$CPM_MASTER_ADDR" ]; then
    echo "cpm: $first_node has no address that other nodes reach; mend /etc/hosts or DNS there (getent ahostsv4)" >&2
    exit 1
fi
export CPM_MASTER_ADDR
export CPM_NODES=${nodes//$'\n'/,}"""

# The port lies above Linux's ephemeral range (as enroot chooses it); a requeued job takes the next one.
_PORT = "export CPM_MASTER_PORT=$((61000 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 4536))"

_BEGIN = """\
# An attempt that Slurm ended itself, by preemption or for a node that failed, counts against its budget.
if [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then
    "${agent[@]}" begin || exit $?
fi"""

_ATTEMPT = """\
attempt=1
while [ -e "$run_dir/attempt-$attempt" ]; do
    attempt=$((attempt + 1))
done
mkdir "$run_dir/attempt-$attempt"
export CPM_ATTEMPT=$attempt
echo "cpm: attempt $attempt begins\""""

_RUN = """\
# A trapped signal ends `wait` early; the last one, after the step has ended, tells the step's own exit code.
trap : TERM USR2
"${step[@]}" "${agent[@]}" &
step_pid=$!
while kill -0 "$step_pid" 2>/dev/null; do
    wait "$step_pid" || :
done
code=0
wait "$step_pid" || code=$?"""

_END = """\
# Says why it ended, starts the job again where that may help, and gives the code of the node that failed first.
"${agent[@]}" end "$code" || code=$?
exit "$code\""""

_IS_ROOTLESS = "docker info --format '{{.SecurityOptions}}'  # names rootless, or this is the daemon of root"
_UUIDS = "nvidia-smi --query-gpu=uuid --format=csv,noheader"
# For a shell by hand: what asks the node for its GPUs, the word that only the node knows, and how it is typed.
_GPUS_BY_HAND = {
    "docker": (f"GPU_UUIDS=$({_UUIDS} | paste -sd,)", '--gpus="device=$GPU_UUIDS"', '"--gpus=\\"device=$GPU_UUIDS\\""'),
    "podman": (
        f"mapfile -t GPUS < <({_UUIDS} | sed 's|^|--device=nvidia.com/gpu=|')",
        "--device=nvidia.com/gpu=$GPU_UUIDS",
        '"${GPUS[@]}"',
    ),
}


def batch_script(plan: LaunchPlan) -> str:
    """The script that `sbatch` takes; a node's command line is in it as a comment."""
    parts = [
        "\n".join(["#!/bin/bash", *_heading(plan), *_directives(plan)]),
        *load_modules(plan),
        _STRICT,
        f"run_dir={shlex.quote(plan.run_dir)}",
        _SCRUB,
        (_SEVERAL_NODES if plan.nodes > 1 else _ONE_NODE) + "\n" + _PORT,
        "\n".join([_array("agent", agent_argv(plan)), _array("step", step_argv(plan))]),
        _BEGIN,
        _ATTEMPT,
        _RUN,
        _END,
    ]
    return "\n\n".join(parts) + "\n"


def agent_argv(plan: LaunchPlan) -> list[str]:
    """The node agent; it runs from the copy in the run directory, so that an upgrade does not touch a queued job."""
    return [plan.agent_python, f"{plan.run_dir}/package", plan.run_dir]


def step_argv(plan: LaunchPlan) -> list[str]:
    """The srun of the batch script, without the program."""
    return ["srun", *options(plan.step)]


def load_modules(plan: LaunchPlan) -> list[str]:
    """Lines of bash that load the plan's modules, or end the script with a sentence."""
    if not plan.modules:
        return []
    return [_MODULES + shlex.join(["module", "load", *plan.modules]) + _MODULE_MISSING]


def by_hand(plan: LaunchPlan) -> list[str]:
    """What to type for a shell in the same surroundings: srun, module load, docker load, docker run."""
    lines = []
    if plan.scheduler == "slurm":
        lines.append(shown(["srun", *options(plan.interactive), "--pty", "bash"]))
    if plan.modules:
        lines.append(shown(["module", "load", *plan.modules]))
    if plan.runtime == "docker-rootless":
        lines.append(_IS_ROOTLESS)
    client = plan.runtime.split("-")[0]
    if plan.container and plan.container.archive and client in _GPUS_BY_HAND:
        lines.append(shown([client, "load", "--input", plan.container.archive.path]))
    list_gpus, symbol, typed = _GPUS_BY_HAND.get(client, ("", "", ""))
    if list_gpus and plan.gpus_per_node:
        lines.append(list_gpus)
    words = shell_argv(plan, SYMBOLIC_NODE)
    return [*lines, " ".join(typed if word == symbol else shown([word]) for word in words)]


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
    first, *rest = (shown(words) for words in lines if words)
    texts = [first, *("  " + text for text in rest)]
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


def _array(name: str, argv: Sequence[str]) -> str:
    words = "\n".join(f"    {shlex.quote(word)}" for word in argv)
    return f"{name}=(\n{words}\n)"
