"""Making a run directory."""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path

from cpm_cluster.launch.plan import LaunchPlan
from cpm_cluster.runs.layout import RunLayout
from cpm_cluster.runs.provenance import provenance
from cpm_cluster.runs.records import append_event, write_atomically, write_json, write_text
from cpm_cluster.runs.run import Run, RunError
from cpm_cluster.runs.snapshot import copy_package, take_snapshot


@dataclass(frozen=True)
class Records:
    """The texts that a new run directory holds; `forced` is what does not fit of a run that was made nevertheless."""

    job: bytes
    resolved: str
    script: str | None
    fit: str
    forced: tuple[str, ...] = ()


def create_run(plan: LaunchPlan, records: Records, code: Path | None) -> Run:
    """Make the run directory, whole or not at all: it is filled under a hidden name, then renamed.

    Raises:
        RunError: the runs folder cannot be written.
        SnapshotError: the code cannot be copied.
        OSError: the disk is full, or a file of the code cannot be read.
    """
    final = Path(plan.run_dir)
    partial = final.with_name(f".{final.name}.partial")
    try:
        _make_runs_dir(final.parent)
        partial.mkdir(mode=0o755)
    except OSError as error:
        raise RunError(
            f"{final.parent}: no run can be made there: {error.strerror};"
            " choose another folder with --runs-dir or CPM_RUNS_DIR"
        ) from error
    files = RunLayout(partial)
    try:
        snapshot = take_snapshot(code, files.code) if code else None
        files.code.mkdir(exist_ok=True)
        copy_package(files.package)
        write_atomically(files.job_file, records.job)
        write_text(files.resolved, records.resolved)
        write_text(files.fit, records.fit)
        write_text(files.plan, plan.to_json())
        if records.script is not None:
            write_text(files.script, records.script, 0o755)
        if plan.trainer is not None:
            write_json(files.trainer, plan.trainer)
        write_json(files.provenance, {**provenance(snapshot), "forced": records.forced})
        append_event(files.events("submitter"), "created")
        if records.forced:
            append_event(files.events("submitter"), "forced", shortages=records.forced)
        partial.rename(final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"{error.strerror}; free some, or choose another folder with --runs-dir or CPM_RUNS_DIR"
            raise OSError(error.errno, what, str(final.parent)) from error
        raise
    return Run(RunLayout(final), plan)


def _make_runs_dir(runs_dir: Path) -> None:
    """A new folder of runs keeps itself out of git, and so out of the snapshots of the code around it."""
    if not runs_dir.exists():
        runs_dir.mkdir(parents=True, exist_ok=True)
        write_text(runs_dir / ".gitignore", "*\n")
