"""The guard: the node agent's parent, which cleans up after it should it be killed.

Whoever started the agent (srun, submitit) knows the guard alone: it passes their signals on, and ends as the agent
does. Should the guard be killed, the agent gets SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Callable

from cpm_cluster.agent import process_tree

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
# The ranks save when they get SIGTERM; nobody else will end them.
GRACE_AFTER_AGENT_S = 20.0


def guarded(agent: Callable[[], int], clean_up_after: Callable[[int], None]) -> int:
    """Run the agent in a child process; its exit code, or 128 + n when it was killed by signal n.

    A killed one is cleaned up after: what is below it ends, then `clean_up_after` gets the signal's number.

    The agent begins with `PASSED_ON` blocked, so that no signal is lost before it can handle them.
    """
    process_tree.adopt_orphans()
    signal.pthread_sigmask(signal.SIG_BLOCK, (*PASSED_ON, signal.SIGCHLD))
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD,))
        process_tree.end_with_parent(guard)
        return agent()
    status = _passing_signals_on(child)
    if not os.WIFSIGNALED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    print(f"cpm: the node agent was killed by signal {number}", file=sys.stderr, flush=True)
    process_tree.end_all(lambda: process_tree.descendants(guard), GRACE_AFTER_AGENT_S)
    process_tree.reap()
    clean_up_after(number)
    return 128 + number


def _passing_signals_on(child: int) -> int:
    """Wait for the child; its status as waitpid(2) gives it."""
    while True:
        number = signal.sigwait((*PASSED_ON, signal.SIGCHLD))
        if number != signal.SIGCHLD:
            process_tree.send([child], number)
            continue
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            return status
