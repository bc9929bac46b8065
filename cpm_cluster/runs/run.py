"""The Run: a directory that is the record of everything, and the verbs that name and find one."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cpm_cluster.launch.plan import LaunchPlan
from cpm_cluster.runs.layout import RunLayout
from cpm_cluster.runs.records import append_event, read_json, write_json

ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*-\d{8}-\d{6}-[0-9a-f]{4}"
# Slurm expands % in --output; the rest would need quoting in a directive or a mount option.
UNSAFE_IN_PATH = re.compile(r"[^\w./@+=~-]")


class RunError(Exception):
    """A run cannot be made or found; the message says why and what to do."""


@dataclass(frozen=True)
class Run:
    """One run directory and the plan in it."""

    files: RunLayout
    plan: LaunchPlan

    @property
    def id(self) -> str:
        """Name, date, time and four digits."""
        return self.plan.run_id


@dataclass(frozen=True)
class Submission:
    """What the scheduler said when it took the job, the machine that asked it, and the attempt that shall begin."""

    scheduler: str
    job_id: str
    host: str
    attempt: int = 1


def new_run_id(job_name: str) -> str:
    """An id that sorts by time within a job's name; its last four digits are the fraction of the second."""
    second, fraction = divmod(time.time_ns(), 10**9)
    moment = time.strftime("%Y%m%d-%H%M%S", time.localtime(second))
    return f"{job_name}-{moment}-{fraction * 0x10000 // 10**9:04x}"


def run_directory(runs_dir: Path, run_id: str) -> Path:
    """Where a run will lie.

    Raises:
        RunError: the path holds characters that Slurm or docker would read as something else.
    """
    path = runs_dir.absolute() / run_id
    unsafe = UNSAFE_IN_PATH.search(str(path))
    if unsafe:
        raise RunError(
            f"{path} holds {unsafe.group()!r}, which Slurm or docker would misread;"
            " choose another folder with --runs-dir or CPM_RUNS_DIR"
        )
    return path


def open_run(folder: Path) -> Run:
    """The run in a directory.

    Raises:
        RunError: it is none, or its plan is of another version.
    """
    files = RunLayout(folder.absolute())
    try:
        plan = LaunchPlan.from_json(files.plan.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise RunError(f"{folder} cannot be read: {error.strerror}; its owner can let you") from error
    except OSError as error:
        raise RunError(f"{folder} is no run directory: {files.plan.name}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{files.plan} {error}") from error
    return Run(files, plan)


def find_run(runs_dir: Path, name: str | None) -> Run:
    """A run by its path, its id, the beginning of its id, or the newest where no name is given.

    Raises:
        RunError: there is none, or several begin like that.
    """
    if name == "":  # what an unset variable of a script comes to
        raise RunError("the name of the run is empty; leave it out for the newest run, cpm runs lists all")
    if name and os.path.isfile(os.path.join(name, "launch.json")):  # Path.is_file raises on long names
        return open_run(Path(name))
    ids = [path.name for path in run_folders(runs_dir)]
    if not ids:
        raise RunError(f"there are no runs in {runs_dir}; cpm-submit JOB makes one, --runs-dir looks elsewhere")
    if name is None:
        return open_run(runs_dir / ids[0])
    found = [run_id for run_id in ids if run_id == name] or [run_id for run_id in ids if run_id.startswith(name)]
    if len(found) == 1:
        return open_run(runs_dir / found[0])
    if found:
        raise RunError(f"{name} is the beginning of {len(found)} runs: {', '.join(found[:5])}; write more of it")
    raise RunError(f"{name} is no run in {runs_dir}; cpm runs lists them")


def run_folders(runs_dir: Path) -> list[Path]:
    """Run directories, the newest first."""
    folders = [path for path in runs_dir.glob("*") if re.fullmatch(ID_PATTERN, path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: path.name[-20:], reverse=True)


def all_runs(runs_dir: Path) -> Iterator[Run]:
    """Runs, the newest first; what cannot be read is left out."""
    for folder in run_folders(runs_dir):
        try:
            yield open_run(folder)
        except RunError:
            continue


def write_submission(run: Run, submission: Submission) -> None:
    """Record the job by which the scheduler knows the run."""
    write_json(run.files.submission, {**vars(submission), "format": 1})


def record_submission(run: Run, submission: Submission) -> None:
    """Record that a person has handed the run over: the job, and when that was."""
    write_submission(run, submission)
    append_event(run.files.events("submitter"), "submitted", job_id=submission.job_id)


def read_submission(run: Run) -> Submission | None:
    """What `write_submission` recorded; None before that.

    Raises:
        RunError: the record is damaged.
    """
    raw = read_json(run.files.submission)
    if raw is None:
        return None
    texts, attempt = [raw.get(key) for key in ("scheduler", "job_id", "host")], raw.get("attempt", 1)
    if not (all(isinstance(text, str) for text in texts) and isinstance(attempt, int)):
        raise RunError(f"{run.files.submission} is damaged, so that nobody knows which job is this run's")
    scheduler, job_id, host = map(str, texts)
    return Submission(scheduler, job_id, host, attempt)
