"""What Slurm says of jobs and partitions: squeue and sinfo, one call for any number of runs.

Job states come as a text ("RUNNING", before data_parser v0.0.40) or as a list (["RUNNING"]); numbers as they are or as
{"set", "infinite", "number"}. Where squeue speaks no JSON, an explicit --format is read.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from cpm_cluster.schedulers import SchedulerError

# Terminal states (man squeue, JOB STATE CODES); a job that Slurm will start again is PENDING, whatever it was before.
ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
TEXT_FORMAT = "%i\t%T\t%r\t%N\t%S"
PATIENCE_S = 60
Item = TypeVar("Item")


@dataclass(frozen=True)
class QueuedJob:
    """A job that Slurm still knows. `start` is when it started or is expected to, in Slurm's own notation or epoch."""

    job_id: str
    states: frozenset[str]
    reason: str
    nodes: str
    start: str

    @property
    def is_alive(self) -> bool:
        """Whether it waits, runs, or is being cleaned up; one that Slurm requeues is alive."""
        return bool(self.states - ENDED) or not self.states

    @property
    def ended_as(self) -> str:
        """Slurm's word for how it ended, such as TIMEOUT; empty while it is alive."""
        return "" if self.is_alive else min(self.states)

    @property
    def is_waiting(self) -> bool:
        return bool(self.states & {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of a partition that are alike, as sinfo groups them; `max_time_s` None: no limit."""

    partition: str
    nodes: int
    gpus: int
    cpus: int
    memory_bytes: int
    max_time_s: int | None
    available: bool


def queued_jobs(user: int) -> dict[str, QueuedJob]:
    """All jobs of a user that Slurm still knows, by id.

    Raises:
        SchedulerError: slurmctld does not answer, or squeue is not there.
    """
    output = _ask(["squeue", "--json", f"--user={user}", "--states=all"])
    if output.lstrip().startswith("{"):
        return parse_squeue_json(output)
    return parse_squeue_text(
        _ask(["squeue", "--noheader", f"--user={user}", "--states=all", f"--format={TEXT_FORMAT}"])
    )


def parse_squeue_json(text: str) -> dict[str, QueuedJob]:
    """Jobs in the output of `squeue --json`, of whatever data_parser version.

    Raises:
        SchedulerError: it is torn, or tells errors. Slurm 22.05 does that, with no jobs and exit code 0, while
            slurmctld is away: no job may be taken for lost then.
    """
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise SchedulerError(f"what squeue --json says cannot be read: {error}") from error
    if answer.get("errors"):
        told = "; ".join(str(error.get("description") or error.get("error")) for error in answer["errors"])
        raise SchedulerError(f"Slurm does not answer: squeue: {told}")
    jobs = (_job(raw) for raw in answer.get("jobs", []))
    return {job.job_id: job for job in jobs}


def _job(raw: dict[str, Any]) -> QueuedJob:
    states = raw.get("job_state", "")
    start = _number(raw.get("start_time"))
    return QueuedJob(
        job_id=str(raw["job_id"]),
        states=frozenset(states.split() if isinstance(states, str) else states),
        reason=str(raw.get("state_reason") or ""),
        nodes=str(raw.get("nodes") or ""),
        start=str(start) if start else "",
    )


def _number(raw: Any) -> int | None:
    if isinstance(raw, dict):
        return int(raw["number"]) if raw.get("set") and not raw.get("infinite") else None
    return int(raw) if isinstance(raw, (int, float)) else None


def parse_squeue_text(text: str) -> dict[str, QueuedJob]:
    """Jobs in the output of `squeue --format=TEXT_FORMAT`."""
    jobs = {}
    for line in text.splitlines():
        fields = line.split("\t")
        if len(fields) == len(TEXT_FORMAT.split("\t")):
            job_id, state, reason, nodes, start = fields
            jobs[job_id] = QueuedJob(job_id, frozenset([state]), reason, nodes, "" if start == "N/A" else start)
    return jobs


def node_groups(partition: str) -> list[NodeGroup]:
    """What a partition really has.

    Raises:
        SchedulerError: slurmctld does not answer.
    """
    text = _ask(["sinfo", "--noheader", f"--partition={partition}", "--format=%R\t%D\t%G\t%c\t%m\t%l\t%a"])
    return list(_each(text.splitlines(), _node_group))


def _node_group(line: str) -> NodeGroup:
    name, nodes, gres, cpus, memory_mib, limit, available = line.split("\t")
    return NodeGroup(
        partition=name,
        nodes=int(nodes),
        gpus=sum(_gpus(entry) for entry in gres.split(",")),
        cpus=int(cpus.rstrip("+")),
        memory_bytes=int(memory_mib.rstrip("+")) << 20,
        max_time_s=_seconds(limit),
        available=available == "up",
    )


def _gpus(gres: str) -> int:
    """`gpu:8`, `gpu:a100:8(S:0-1)` → 8; others 0."""
    parts = gres.partition("(")[0].split(":")
    return int(parts[-1]) if parts[0] == "gpu" and parts[-1].isdigit() else 0


def _seconds(limit: str) -> int | None:
    """`7-00:00:00`, `30:00` (minutes:seconds), `infinite`."""
    if limit in ("infinite", "n/a", ""):
        return None
    days, _, clock = limit.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = seconds * 60 + int(part)
    return int(days or 0) * 86_400 + seconds


def _each(lines: Iterable[str], read: Callable[[str], Item]) -> Iterable[Item]:
    """What can be read; a line in another form is passed over, since sites patch these tools."""
    for line in lines:
        try:
            yield read(line)
        except ValueError:
            continue


def _ask(argv: list[str]) -> str:
    """What a client command prints; JSON that this Slurm cannot write gives an empty text."""
    try:
        done = subprocess.run(argv, capture_output=True, timeout=PATIENCE_S, env=client_environment())
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"Slurm does not answer: {argv[0]} has been waiting for {PATIENCE_S} s") from error
    except OSError as error:
        raise SchedulerError(f"{argv[0]} cannot be run: {error.strerror}") from error
    errors = done.stderr.decode("utf-8", "replace").strip()
    if done.returncode != 0 and "contact" in errors:
        raise SchedulerError(f"Slurm does not answer: {errors}")
    if done.returncode != 0 and "--json" not in argv:
        raise SchedulerError(f"{argv[0]}: {errors or f'exit code {done.returncode}'}")
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


def client_environment() -> dict[str, str]:
    """The environment for Slurm's commands, without what a surrounding job or the user's own defaults would change.

    SBATCH_* and SQUEUE_* override what a script says (man sbatch, INPUT ENVIRONMENT VARIABLES).
    """
    misleading = ("SLURM_", "SBATCH_", "SQUEUE_", "SINFO_", "SCANCEL_", "SACCT_", "CPM_")
    return {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(misleading)}
