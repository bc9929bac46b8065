"""Finding and ending the processes of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from processes import is_gone, parent_of, program, wait_for

from cpm_cluster.agent.process_tree import (
    carries,
    descendants,
    end_all,
    group_exists,
    handlers_of,
    processes_of_run,
    reap,
    send,
    send_to_group,
)

FAMILY = "sleep 60 & bash -c 'sleep 60 & echo ready; wait' & wait"
# of this session of tests alone: another one may run beside it
RUN = {"CPM_RUN_ID": f"job-of-test-{os.getpid()}"}


def test_descendants_are_found_parents_before_children():
    with program(FAMILY) as root:
        found = wait_for(lambda: (pids := descendants(root.pid)) and len(pids) == 3 and pids)
        above = [root.pid, *found]
        assert all(parent_of(pid) in above[: above.index(pid)] for pid in found)
        assert end_all(lambda: descendants(root.pid), 5)
        assert descendants(root.pid) == []


def test_a_process_that_has_ended_but_was_not_waited_for_is_no_descendant():
    source = "import os, time\nif os.fork() == 0: os._exit(0)\nprint('ready', flush=True)\ntime.sleep(60)"
    with program(source, language="python") as root:
        wait_for(lambda: descendants(root.pid) == [])


def test_processes_of_a_run_are_found_by_their_environment_and_what_hides_from_it_by_its_parent():
    with program("env -i sleep 60 & echo ready; wait", env=RUN) as root:
        hidden = wait_for(lambda: [p for p in descendants(root.pid) if not carries(p, RUN["CPM_RUN_ID"])])
        assert sorted(processes_of_run(RUN["CPM_RUN_ID"])) == sorted([root.pid, *hidden])
        assert carries(root.pid, RUN["CPM_RUN_ID"])
        assert processes_of_run(RUN["CPM_RUN_ID"][:-1]) == []
        assert end_all(lambda: processes_of_run(RUN["CPM_RUN_ID"]), 5)


def test_whoever_asks_is_no_process_of_the_run():
    """As `cpm status` in a shell that a job has started."""
    question = "from cpm_cluster.agent.process_tree import *; print(processes_of_run(sys.argv[1]))"
    argv = [sys.executable, "-c", f"import sys; {question}", RUN["CPM_RUN_ID"]]
    done = subprocess.run(argv, env={**os.environ, **RUN}, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_what_listens_ends_itself_and_what_does_not_is_killed():
    with program("trap 'exit 5' TERM; echo ready; while true; do sleep 0.05; done") as polite:
        assert end_all(lambda: [] if is_gone(polite.pid) else [polite.pid], 10)
        assert polite.wait() == 5
    with program("trap '' TERM; echo ready; while true; do sleep 0.05; done") as deaf:
        started = time.monotonic()
        assert end_all(lambda: [] if is_gone(deaf.pid) else [deaf.pid], 0.3)
        assert deaf.wait() == -signal.SIGKILL and time.monotonic() - started >= 0.3


def test_what_starts_others_while_it_ends_ends_with_them():
    source = (
        "trap 'for i in 1 2 3; do (trap \"\" TERM; sleep 60) & done' TERM; echo ready; while true; do sleep 0.05; done"
    )
    with program(source) as root:
        assert end_all(lambda: [pid for pid in (*descendants(root.pid), root.pid) if not is_gone(pid)], 0.3)
        assert descendants(root.pid) == []


def test_nothing_to_end():
    started = time.monotonic()
    assert end_all(list, 10)
    assert time.monotonic() - started < 1


def test_signals_to_those_who_have_ended_are_passed_over():
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    send([ended.pid], signal.SIGTERM)
    send_to_group(ended.pid, signal.SIGTERM)
    assert not group_exists(ended.pid)


def test_a_group_exists_while_one_of_it_does():
    with program("sleep 60 & echo ready", start_new_session=True) as leader:
        leader.wait()
        assert group_exists(leader.pid)
        send_to_group(leader.pid, signal.SIGTERM)
        wait_for(lambda: not group_exists(leader.pid))


def test_reap_collects_orphans_but_leaves_the_status_that_somebody_waits_for():
    source = """
import os, subprocess
from cpm_cluster.agent.process_tree import adopt_orphans, reap
adopt_orphans()
program = subprocess.Popen(["sh", "-c", "true & exit 7"])
os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)
reap(but=program.pid)
code = program.wait()
try:
    while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT):
        reap()
except ChildProcessError:
    print("ready", flush=True)
print(code, flush=True)
"""
    with program(source, language="python") as done:
        assert done.stdout.read() == "7\n"


def test_reap_without_children():
    reap()


def test_a_warning_goes_to_the_outermost_who_know_it():
    wait = "while true; do sleep 0.05; done"
    inner = f"trap 'exit 5' USR2; (trap : USR2; {wait}) & echo ready; {wait}"
    with program('bash -c "$1" & wait', inner) as shell:
        (handler,) = handlers_of(shell.pid, signal.SIGUSR2)
        assert handler != shell.pid
        assert handlers_of(handler, signal.SIGUSR2) == [handler]
        assert handlers_of(shell.pid, signal.SIGUSR1) == []
        end_all(lambda: descendants(shell.pid), 0.1)
    assert handlers_of(shell.pid, signal.SIGUSR2) == []


def test_a_process_may_end_with_its_parent_however_that_ends():
    source = """
import os, signal, sys, time
from cpm_cluster.agent.process_tree import end_with_parent
parent = os.getpid()
child = os.fork()
if child == 0:
    end_with_parent(parent)
    print("ready", flush=True)
    time.sleep(60)
else:
    time.sleep(60)
"""
    with program(source, language="python") as parent:
        (child,) = descendants(parent.pid)
        parent.kill()
        parent.wait()
        wait_for(lambda: is_gone(child))


def test_a_process_whose_parent_has_ended_before_it_could_say_so_ends_at_once():
    call = "from cpm_cluster.agent.process_tree import end_with_parent; end_with_parent(1 << 22)"
    assert subprocess.run([sys.executable, "-c", call]).returncode == -signal.SIGTERM
