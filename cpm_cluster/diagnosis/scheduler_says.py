"""The scheduler's word on how a job ended, where a run's own records leave that open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cpm_cluster.diagnosis.verdict import Evidence, Verdict
from cpm_cluster.runs.job_end import JobEnd
from cpm_cluster.specs.problems import printable, shortened

ROW_LIMIT = 1000
# Verdicts that only say that something else ended the run.
OPEN = ("lost", "terminated")
# Every process that the kernel kills for lack of memory gets a SIGKILL, as others do.
OUT_OF_MEMORY = "OUT_OF_MEMORY"


@dataclass(frozen=True)
class Saying:
    """What a word of Slurm's means for a verdict; `remedy` goes before that of the verdict, or stands alone."""

    category: str
    cause: str
    transient: bool = True
    remedy: str = ""


NODE_FAILED = Saying("node", "Slurm ended it because a node failed{on_nodes}")
SAYINGS: Mapping[str, Saying] = {
    "TIMEOUT": Saying(
        "time limit", "Slurm ended it at its time limit", remedy="lengthen signal_lead or time_limit, or"
    ),
    "DEADLINE": Saying("time limit", "Slurm ended it because it could not be done before its deadline"),
    "NODE_FAIL": NODE_FAILED,
    "BOOT_FAIL": NODE_FAILED,
    "PREEMPTED": Saying("preempted", "Slurm preempted it for another job"),
    "CANCELLED": Saying("cancelled", "It was cancelled in Slurm{by_user}, not by cpm cancel", transient=False),
    OUT_OF_MEMORY: Saying(
        "out of memory",
        "It was killed for lack of host memory{on_nodes}",
        transient=False,
        remedy="ask for more resources.memory_per_node",
    ),
}


def leaves_open(verdict: Verdict) -> bool:
    """Whether the scheduler may know more about it."""
    return verdict.category in (*OPEN, "killed")


def as_the_scheduler_says(verdict: Verdict, end: JobEnd) -> Verdict:
    """A verdict that leaves open what ended the run, with the scheduler's word for it, and its row as evidence."""
    if verdict.category not in OPEN and end.state != OUT_OF_MEMORY:
        return verdict
    row = Evidence(end.said_by, 0, shortened(printable(end.row), ROW_LIMIT))
    evidence = (row, *verdict.evidence)
    saying = SAYINGS.get(end.state)
    if saying is None:
        return replace(verdict, evidence=evidence)
    on_nodes = f" (on {end.nodes})" if end.nodes else ""
    by_user = f" by {end.cancelled_by}" if end.cancelled_by else ""
    return replace(
        verdict,
        category=saying.category,
        cause=saying.cause.format(on_nodes=on_nodes, by_user=by_user) + ".",
        transient=saying.transient,
        remedy=_remedy(saying, verdict),
        evidence=evidence,
    )


def _remedy(saying: Saying, verdict: Verdict) -> str:
    if not saying.remedy:
        return verdict.remedy
    return f"{saying.remedy}: {verdict.remedy}" if saying.transient else saying.remedy
