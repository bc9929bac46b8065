"""What Slurm's accounting says of jobs that squeue has forgotten (MinJobAge, 300 s): one call for any number of runs.

Many sites have no slurmdbd, and a slurmdbd may be away: then nothing is known, which is no error.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

from cpm_cluster.schedulers.slurm_queue import ENDED, client_environment

# Reason is the last: it alone may hold any text.
FIELDS = ("JobIDRaw", "State", "ExitCode", "DerivedExitCode", "NodeList", "Start", "End", "Submit", "Reason")
# `CANCELLED by 1001`; a `+` ends what sacct has cut off.
STATE = re.compile(r"(?P<word>.*?)(?: by (?P<uid>[0-9]{1,10}))?\+?")
CODE = re.compile(r"([0-9]{1,9}):([0-9]{1,9})")
UNKNOWN = frozenset({"Unknown", "None", "None assigned", "N/A", ""})
PATIENCE_S = 10


@dataclass(frozen=True)
class AccountedStep:
    """`step` is `batch`, `extern` or a number; exit code and signal are None where Slurm did not learn them."""

    step: str
    state: str
    exit_code: int | None
    signal: int | None
    nodes: str


@dataclass(frozen=True)
class AccountedJob:
    """One incarnation of a job: a requeued job has several under one id.

    `state` is Slurm's word without what follows it; `signal` that which ended the batch script; `derived_exit_code` the
    highest of its steps; times as sacct writes them, empty where there is none; `row` the line that says all this.
    """

    job_id: str
    state: str
    exit_code: int | None
    signal: int | None
    derived_exit_code: int | None
    nodes: str
    start: str
    end: str
    submitted: str
    reason: str
    cancelled_by: int | None
    row: str
    steps: tuple[AccountedStep, ...] = field(default=())

    @property
    def has_ended(self) -> bool:
        """Whether this incarnation is over for good: one that was requeued is followed by another."""
        return self.state in ENDED

    @property
    def word(self) -> str:
        """The state, or the word of a step that tells more: a job that failed for lack of memory is only FAILED."""
        short_of_memory = any(step.state == "OUT_OF_MEMORY" for step in self.steps)
        return "OUT_OF_MEMORY" if self.state == "FAILED" and short_of_memory else self.state


def accounted_jobs(job_ids: Collection[str], user: int) -> dict[str, list[AccountedJob]]:
    """The incarnations of a user's jobs by job id, the newest last; a job that is not known is left out."""
    if not job_ids:
        return {}
    argv = ["sacct", "--parsable2", "--noheader", "--duplicates", f"--uid={user}", f"--format={','.join(FIELDS)}"]
    argv.append(f"--jobs={','.join(sorted(job_ids))}")
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE_S,
            env=client_environment(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse_sacct(done.stdout.decode("utf-8", "replace")) if done.returncode == 0 else {}


def parse_sacct(text: str) -> dict[str, list[AccountedJob]]:
    """Jobs in the output of sacct, each with the steps that follow its row; lines in another form are passed over."""
    jobs: dict[str, list[AccountedJob]] = {}
    for row, values in _rows(text):
        job_id, _, step = values["JobIDRaw"].partition(".")
        if not step:
            jobs.setdefault(job_id, []).append(_job(row, values))
        elif job_id in jobs:
            job = jobs[job_id][-1]
            jobs[job_id][-1] = replace(job, steps=(*job.steps, _step(step, values)))
    return {job_id: sorted(incarnations, key=lambda job: job.submitted) for job_id, incarnations in jobs.items()}


def _rows(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    for line in text.split("\n"):
        values = [value.strip() for value in line.split("|", len(FIELDS) - 1)]
        if len(values) == len(FIELDS) and values[0]:
            yield line, dict(zip(FIELDS, values, strict=True))


def _job(row: str, values: dict[str, str]) -> AccountedJob:
    state, cancelled_by = _state(values["State"])
    exit_code, number = _code(values["ExitCode"])
    return AccountedJob(
        job_id=values["JobIDRaw"],
        state=state,
        exit_code=exit_code,
        signal=number,
        derived_exit_code=_code(values["DerivedExitCode"])[0],
        nodes=_known(values["NodeList"]),
        start=_known(values["Start"]),
        end=_known(values["End"]),
        submitted=_known(values["Submit"]),
        reason=_known(values["Reason"]),
        cancelled_by=cancelled_by,
        row=row,
    )


def _step(step: str, values: dict[str, str]) -> AccountedStep:
    exit_code, number = _code(values["ExitCode"])
    return AccountedStep(step, _state(values["State"])[0], exit_code, number, _known(values["NodeList"]))


def _state(text: str) -> tuple[str, int | None]:
    """Slurm's word, and the uid of who cancelled the job; a word that we do not know stays as it is."""
    found = STATE.fullmatch(text)
    if found is None:
        return text, None
    return found["word"], int(found["uid"]) if found["uid"] else None


def _code(text: str) -> tuple[int | None, int | None]:
    """`code:signal`."""
    found = CODE.fullmatch(text)
    return (int(found[1]), int(found[2])) if found else (None, None)


def _known(text: str) -> str:
    return "" if text in UNKNOWN else text
