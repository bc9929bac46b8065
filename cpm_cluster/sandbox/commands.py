"""Commands of the system, with an error that says what failed and why."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from cpm_cluster.sandbox.state import SandboxError

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(
    argv: Sequence[str], *, stdin: str = "", environment: Mapping[str, str] | None = None, patience_s: float = 120
) -> str:
    """Stdout of a command that must succeed.

    Raises:
        SandboxError: it is not there, fails, or takes longer than `patience_s`.
    """
    shown = " ".join(argv)
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            env={"PATH": SYSTEM_PATH, "LC_ALL": "C", **(environment or {})},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=patience_s,
        )
    except OSError as error:
        raise SandboxError(f"{argv[0]} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise SandboxError(f"{shown} does not return within {patience_s:.0f} s") from None
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise SandboxError(f"{shown} ended with code {done.returncode}: {words[-1].strip()}")
    return done.stdout


def succeeds(argv: Sequence[str], environment: Mapping[str, str] | None = None, patience_s: float = 120) -> bool:
    """Whether a command ends with code 0."""
    try:
        run(argv, environment=environment, patience_s=patience_s)
    except SandboxError:
        return False
    return True


def wait_for(condition: Callable[[], bool], patience_s: float, pause_s: float = 0.1) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause_s)
    return True
