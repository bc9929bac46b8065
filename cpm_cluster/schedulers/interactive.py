"""A program of ours that has the terminal, here or on a node, and the folder that it starts from."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cpm_cluster.agent.process_tree import end_with_parent
from cpm_cluster.launch.plan import LaunchPlan
from cpm_cluster.launch.shell import epilog_file, epilog_script, shell_command
from cpm_cluster.runs.records import write_text
from cpm_cluster.runs.run import RunError
from cpm_cluster.runs.snapshot import copy_package
from cpm_cluster.schedulers.slurm_queue import client_environment

PATIENCE_WITH_EPILOG_S = 15.0
ENTRY = "from cpm_cluster.agent.shell import main\n\nraise SystemExit(main())\n"


def hold_shell(plan: LaunchPlan) -> int:
    """Run a shell's agent on this terminal; its exit code, or 128 + n where signal n ended it.

    Raises:
        RunError: the folder of the plan cannot be made.
        OSError: the program cannot be run.
    """
    folder = Path(plan.run_dir)
    try:
        _fill(folder, plan)
        with _terminal_kept():
            code = _hold(plan)
        if code < 0:
            _await_epilog(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 128 - code if code < 0 else code


def _await_epilog(folder: Path) -> None:
    """The task epilog runs from the folder, and removes it, where srun was killed."""
    deadline = time.monotonic() + PATIENCE_WITH_EPILOG_S
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def _fill(folder: Path, plan: LaunchPlan) -> None:
    """The plan and the package; git, and so a snapshot of the code around it, passes it over."""
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise RunError(
            f"{folder.parent} cannot be written ({error.strerror}); run cpm shell in a folder of yours that the nodes"
            " see, too"
        ) from error
    write_text(folder / ".gitignore", "*\n")
    copy_package(folder / "package")
    write_text(folder / "package" / "__main__.py", ENTRY)
    write_text(folder / "launch.json", plan.to_json())
    write_text(Path(epilog_file(plan)), epilog_script(plan), 0o755)


def _hold(plan: LaunchPlan) -> int:
    """Start the agent, and pass on what is meant for it; its return code as Popen has it.

    srun has a session of its own: of a closed window, or SIGTERM, it would have all of the step killed at once. The
    terminal stays its stdin and stdout all the same.
    """
    parent = os.getpid()
    slurm = plan.scheduler == "slurm"
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        if process is None:
            return
        if slurm and number in (signal.SIGHUP, signal.SIGTERM):
            _cancel(plan.run_id)
        elif slurm or number == signal.SIGTERM:  # here, the terminal sends the others to the agent as well
            process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGWINCH)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        process = subprocess.Popen(
            shell_command(plan),
            env=client_environment(),
            start_new_session=slurm,
            preexec_fn=lambda: end_with_parent(parent),
        )
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cancel(job_name: str) -> None:
    """Slurm sends the agent SIGTERM, and gives it KillWait."""
    argv = ["scancel", "--quiet", f"--user={os.getuid()}", f"--name={job_name}"]
    subprocess.run(argv, env=client_environment(), stdin=subprocess.DEVNULL, capture_output=True)


@contextmanager
def _terminal_kept() -> Iterator[None]:
    """srun sets the terminal to raw, and leaves it so when it is killed."""
    if not sys.stdin.isatty():
        yield
        return
    state = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        try:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, state)
        except termios.error:  # the window is closed
            pass
