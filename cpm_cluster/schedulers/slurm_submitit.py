"""submitit's Slurm executor, with our own script in place of the one that it would write.

submitit's script runs a pickled function whose signal handling ignores SIGTERM; ours runs the node agent.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from cpm_cluster.schedulers import SchedulerError


class ScriptExecutor(submitit.SlurmExecutor):
    """Submits a script as it stands."""

    def __init__(self, folder: Path, script: Path) -> None:
        super().__init__(folder=folder)
        self._script = script

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._script.read_text(encoding="utf-8")

    def submit_script(self) -> submitit.Job[Any]:
        """sbatch the script; raises FailedJobError or FailedSubmissionError as submitit does."""
        submitit.core.utils.JobPaths.get_first_id_independent_folder(self.folder).mkdir(parents=True, exist_ok=True)
        return self._submit_command("")


def submit_script(script: Path, folder: Path, environment: Mapping[str, str]) -> str:
    """The job's id.

    Raises:
        SchedulerError: sbatch refuses, in its own words.
    """
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        return str(ScriptExecutor(folder, script).submit_script().job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        raise SchedulerError(f"sbatch refuses {script}: {error}") from error
    finally:
        os.environ.clear()
        os.environ.update(before)
