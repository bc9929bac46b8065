"""What engine command runs: the program, its options, and what the planner is told of it."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator

from cpm_cluster.specs.checks.rules import Finding, reads
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.problems import listed
from cpm_cluster.specs.workload import INFERENCE_ENGINES, QUANTISED, TRAINING_ENGINES

SHELLS = frozenset("sh bash dash ksh zsh".split())
SHELL_VARIABLE = re.compile(r"\$(\{[A-Z][A-Z0-9_]*\}|[A-Z][A-Z0-9_]*)")
RENDEZVOUS = re.compile(r"--(rdzv|master|node|nnodes|nproc)")  # torchrun's


@reads("engine", "command")
def _command(spec: JobSpec) -> Iterator[Finding]:
    if spec.engine == "command" and not spec.command:
        yield "command", "is missing: engine command needs the program and its arguments, [python, train.py]"
    if spec.engine != "command" and spec.command:
        yield "command", f"belongs to engine command, not to {spec.engine}; remove it, or write engine: command"


@reads("engine", "command")
def _no_shell(spec: JobSpec) -> Iterator[Finding]:
    """A line that was pasted from a shell script; words with blanks are programs of their own, as of `python -c`."""
    if spec.engine != "command" or any(posixpath.basename(word) in SHELLS for word in spec.command):
        return
    for place, word in enumerate(spec.command):
        variable = SHELL_VARIABLE.search(word)
        if variable is None or any(character.isspace() for character in word):
            continue
        instead = 'have a shell read the line: [bash, -c, "…"], or [bash, train.sh]'
        if RENDEZVOUS.match(word):
            instead = f"leave out such options, which cpm-cluster gives torchrun (PET_* variables), or {instead}"
        yield f"command[{place}]", f"no shell reads it, so {variable[0]} would stay as it is written; {instead}"


@reads("engine", "command", "resources")
def _torchrun(spec: JobSpec) -> Iterator[Finding]:
    """Too many nodes in torchrun's own options, and it waits for them; too few, and each node trains by itself."""
    if spec.engine != "command" or posixpath.basename((*spec.command, "")[0]) != "torchrun":
        return
    line, asked = " ".join(spec.command), spec.resources
    for option, there in (("nnodes", asked.nodes), ("nproc_per_node", asked.ranks_per_node)):
        stated = re.search(rf" --{option.replace('_', '[_-]')}[= ](\d+)(?= |$)", line)
        if stated and int(stated[1]) != there:
            yield "command", f"says{stated[0]}, but the job has {there}; leave it out, since cpm-cluster tells torchrun"


@reads("engine", "model", "workload", "resources")
def _workload(spec: JobSpec) -> Iterator[Finding]:
    work = spec.workload
    if work is None:
        return
    if spec.engine != "command":
        yield "workload", f"belongs to engine command; of {spec.engine} the keys of the job itself tell: remove it"
        return
    if spec.model is None:
        yield "model", "is missing: workload needs an architecture, a name in configs/models"
    engines = TRAINING_ENGINES if work.mode == "train" else INFERENCE_ENGINES
    if work.engine not in engines:
        yield "workload.engine", f"{work.engine} does not {work.mode}; write {listed(engines)}"
    if work.mode == "train" and work.precision in QUANTISED:
        yield "workload.precision", f"{work.precision} is for inference; write fp32, bf16 or fp16"
    if work.engine == "bmtrain" and work.zero_stage < 2:
        yield "workload.zero_stage", f"{work.zero_stage} is not a stage of BMTrain; write 2 or 3"
    if work.engine == "ddp" and (work.offload_optimizer or "workload.zero_stage" in spec.origins):
        yield "workload.engine", "ddp shards and offloads nothing; remove zero_stage and offload, or name another"
    if work.offload_param and work.engine not in ("deepspeed", "fsdp"):
        yield "workload.offload_param", f"{work.engine} keeps its weights on the GPU; remove it"
