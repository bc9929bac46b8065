"""How a job ended as its scheduler says, kept with the run: squeue forgets it in minutes, and accounting may be off."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from cpm_cluster.runs.records import append_event, read_events
from cpm_cluster.runs.run import Run

KIND = "job_ended"


@dataclass(frozen=True)
class JobEnd:
    """`state` is the scheduler's own word, such as TIMEOUT; `said_by` the command that said so, `row` what it said.

    `nodes` are those of the job, `cancelled_by` is whose scancel it was; empty where that is not known.
    """

    job_id: str
    state: str
    said_by: str
    row: str
    nodes: str = ""
    cancelled_by: str = ""

    @property
    def is_final(self) -> bool:
        """squeue knows that a job was cancelled before accounting knows by whom."""
        return self.state != "CANCELLED" or bool(self.cancelled_by)


def record_job_end(run: Run, attempt: int, end: JobEnd) -> None:
    """Keep it as an event; raises OSError where the run is somebody else's to write to."""
    append_event(run.files.events("submitter"), KIND, attempt=attempt, **asdict(end))


def recorded_job_end(run: Run, attempt: int, job_id: str) -> JobEnd | None:
    """What `record_job_end` kept last of this job and attempt."""
    names = [field.name for field in fields(JobEnd)]
    for event in reversed(read_events(run.files.root / "events")):
        if (event["kind"], event.get("attempt"), event.get("job_id")) == (KIND, attempt, job_id):
            return JobEnd(**{name: str(event.get(name, "")) for name in names})
    return None
