"""How local runs end before their time: cancelled, killed, out of time. Nothing is left, and the state is true."""

from __future__ import annotations

import json
import os
import signal

from local_runs import ONE_RANK, PATIENCE_S, all_processes, command_line, parent_of, wait_for

ENDLESS = {
    "training__steps": 1_000_000,
    "training__log_every": 50,
    "training__checkpoint": {"every": 500_000, "keep": 2},
}
# The warning comes 8 s after the start, which takes one on idle cores; what has to end then has 8 s for that.
WARNED = {"time_limit": "18s", "signal_lead": "10s"}
# Of this session of tests alone: another one may run beside it.
DAEMON = f"hidden-daemon-of-test-{os.getpid()}"


def test_cancel_while_training_saves(runs):
    run = runs.detached(runs.job(**ENDLESS, resources=ONE_RANK))
    run.await_step(5)
    done = runs.cpm("cancel")
    assert done.returncode == 0
    assert done.stdout == f"{run.id}: cancelled\n" and "the trainer saves first" in done.stderr
    assert not run.processes()
    saved = run.checkpoint_step
    assert saved >= 5
    status = run.status()
    assert (status["state"], status["exit_code"], status["attempt"]) == ("cancelled", 143, 1)
    assert f"(from the checkpoint of step {saved})" in status["verdict"]["remedy"]


def test_cancel_of_a_program_that_does_not_listen(runs):
    """The agent gives it half a minute, unless it is cancelled again."""
    run = runs.detached(runs.bash("trap '' TERM; echo deaf; while true; do sleep 0.1; done"))
    run.await_log("deaf")
    first = runs.open("cancel", run.id)
    wait_for("request", lambda: [e for e in run.events() if e["kind"] == "signal"])
    assert run.processes()
    again = runs.cpm("cancel", run.id, "--json")
    assert json.loads(again.stdout) == {"run": run.id, "state": "cancelled", "was": "running"}
    assert first.wait(PATIENCE_S) == 0
    first.stdout.close()
    assert not run.processes()
    assert run.status()["exit_code"] == 137


def test_cancel_gives_the_children_of_a_shell_the_time_to_save(runs):
    """The shell dies at once; the program below it, which got the signal, too, saves."""
    (runs.jobs / "saver.sh").write_text(
        "trap 'sleep 1; echo saved; exit' TERM; echo ready; while true; do sleep 0.1; done"
    )
    run = runs.detached(runs.bash("bash saver.sh; echo never"))
    run.await_log("ready")
    runs.cpm("cancel")
    assert run.log.endswith("saved\n") and "never" not in run.log
    assert run.status()["state"] == "cancelled"


def test_what_a_program_leaves_behind_ends_with_the_run(runs):
    """Double forks, sessions of their own, an empty environment, deaf to SIGTERM: the agent adopts them all."""
    script = """
        bash=$(command -v bash)
        deaf="trap '' TERM HUP; exec -a NAME sleep 600"
        (setsid "$bash" -c "$deaf" </dev/null &>/dev/null &)
        (env -i setsid "$bash" -c "$deaf" </dev/null &>/dev/null &)
        while [ ! -e go ]; do sleep 0.05; done
    """
    run = runs.detached(runs.bash(script.replace("NAME", DAEMON)))
    wait_for("daemons", lambda: len(_hidden_daemons()) == 2)
    (run.folder / "code" / "go").touch()
    assert run.await_end()["state"] == "finished"
    assert not _hidden_daemons() and not run.processes()


def _hidden_daemons():
    return [pid for pid in all_processes() if command_line(pid).startswith(DAEMON)]


def test_cancel_of_a_program_that_left_daemons(runs):
    run = runs.detached(runs.bash("(setsid sleep 601 &); (env -i setsid sleep 602 &); echo started; exec sleep 600"))
    run.await_log("started")
    assert f"{run.id}: cancelled" in runs.cpm("cancel").stdout
    assert not run.processes()


def test_cancel_before_there_is_an_agent(runs):
    run = runs.detached(runs.bash("echo started; sleep 600"))
    done = runs.cpm("cancel")
    assert f"{run.id}: cancelled" in done.stdout
    assert not run.processes()
    assert run.status()["state"] == "cancelled"
    assert not run.log or run.log == "started\n"


def test_cancel_of_a_run_that_has_ended_changes_nothing(runs):
    runs.submit(runs.bash("exit 3"))
    run = runs.newest()
    before = run.status()
    done = runs.cpm("cancel")
    assert done.returncode == 0 and done.stdout == f"{run.id}: had ended before: failed\n"
    assert run.status() == before


def test_the_controller_is_killed(runs):
    run = runs.detached(runs.job(**ENDLESS, resources=ONE_RANK))
    run.await_step(3)
    os.kill(run.controller, signal.SIGKILL)
    run.await_nothing_left()
    status = run.await_end()
    assert (status["state"], status["exit_code"]) == ("failed", 143)
    assert status["verdict"]["category"] == "terminated" and status["verdict"]["transient"]
    assert f"checkpoint of step {run.checkpoint_step}" in status["verdict"]["remedy"]


def test_the_agent_is_killed_and_resume_goes_on(runs):
    """The trainer saves; a program that does not listen is ended by the guard, as there is nobody else."""
    deaf = runs.detached(runs.bash("trap '' TERM; echo deaf; while true; do sleep 0.1; done"))
    run = runs.detached(runs.job(**ENDLESS))
    deaf.await_log("deaf")
    run.await_step(3)
    for each in (deaf, run):
        os.kill(each.agent, signal.SIGKILL)
    _check_killed(run)
    saved = run.checkpoint_step
    assert saved >= 3

    run.shorten_to(saved + 20)
    assert runs.cpm("resume", run.id).returncode == 0
    assert (run.status()["state"], run.status()["attempt"]) == ("finished", 2)
    assert f"continuing after step {saved}" in runs.cpm("logs", run.id).stdout
    assert "continuing" not in runs.cpm("logs", run.id, "--attempt", "1").stdout
    steps = [row["step"] for row in run.lines("metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == saved + 20
    again = runs.cpm("resume", run.id)
    assert again.returncode == 2 and "only a run that ended early can go on" in again.stderr
    _check_killed(deaf)


def _check_killed(run):
    run.await_nothing_left()
    status = run.await_end()
    assert (status["state"], status["exit_code"]) == ("failed", 137)
    assert status["verdict"]["cause"].startswith("The node agent on ")
    assert status["verdict"]["cause"].endswith(" was killed (SIGKILL).")
    assert status["verdict"]["transient"]


def test_the_agents_guard_is_killed(runs):
    run = runs.detached(runs.bash("trap 'exit 9' TERM; echo started; while true; do sleep 0.1; done"))
    run.await_log("started")
    os.kill(run.guard, signal.SIGKILL)
    run.await_nothing_left()
    assert (run.await_end()["state"], run.status()["exit_code"]) == ("failed", 9)
    assert run.status()["verdict"]["category"] == "terminated"


def test_agent_and_guard_are_killed_together(runs):
    """Nobody is left to end a program that does not listen: it goes on, the status says so, and cancel ends it."""
    run = runs.detached(runs.bash("trap '' TERM; echo deaf; while true; do sleep 0.1; done"))
    run.await_log("deaf")
    for pid in (run.guard, run.agent):
        os.kill(pid, signal.SIGKILL)
    wait_for("end of the controller", lambda: run.controller not in run.processes())
    assert run.status()["state"] == "running" and run.processes()
    assert f"{run.id}: cancelled" in runs.cpm("cancel").stdout
    assert not run.processes()


def test_the_launcher_of_the_ranks_is_killed(runs):
    run = runs.detached(runs.job(**ENDLESS, resources=ONE_RANK))
    run.await_step(3)
    os.kill(run.torchrun, signal.SIGKILL)
    run.await_nothing_left()
    status = run.await_end()
    assert (status["state"], status["exit_code"]) == ("failed", 137)
    assert "torchrun" in status["verdict"]["cause"] and "SIGKILL" in status["verdict"]["cause"]


def test_one_rank_is_killed(runs):
    run = runs.detached(runs.job(**ENDLESS))
    run.await_step(3)
    os.kill(run.rank(1), signal.SIGKILL)
    run.await_nothing_left()
    status = run.await_end()
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert (status["verdict"]["category"], status["verdict"]["rank"]) == ("killed", 1)
    assert "SIGKILL" in status["verdict"]["cause"] and "memory" in status["verdict"]["cause"]
    (evidence,) = status["verdict"]["evidence"]
    line = run.text(evidence["file"]).splitlines()[evidence["line"] - 1]
    assert "-9" in line


def test_the_time_limit_stops_a_training_with_a_checkpoint_and_resume_finishes_it(runs):
    """submitit's controller, which counts the time, is held until training has begun, however long that takes."""
    job = runs.job(**ENDLESS, resources=ONE_RANK, time_limit="40s", signal_lead="30s")
    submitter = runs.open("submit", job)
    run = wait_for("run", lambda: runs.runs_dir.exists() and runs.all())[0]
    controller = wait_for("controller", lambda: (run.folder / "submission.json").exists() and run.controller)
    wait_for("its child", lambda: any(parent_of(pid) == controller for pid in all_processes()))
    os.kill(controller, signal.SIGSTOP)
    run.await_step(3)
    os.kill(controller, signal.SIGCONT)
    told = submitter.communicate(timeout=PATIENCE_S)[0]
    assert submitter.returncode == 85, told
    assert "saved and stopped before its time limit" in told and "cpm resume" in told
    assert run.status()["state"] == "stopped"
    assert not run.processes()
    run.shorten_to(run.checkpoint_step + 10)
    assert runs.cpm("resume").returncode == 0
    assert run.status()["state"] == "finished"


def test_a_program_may_stop_itself_before_the_time_limit(runs):
    script = "trap 'echo saved; exit 85' USR2; echo started; while true; do sleep 0.05; done"
    done = runs.submit(runs.bash(script, **WARNED))
    assert done.returncode == 85
    assert runs.newest().status()["state"] == "stopped"
    assert runs.newest().log == "started\nsaved\n"


def test_the_warning_reaches_those_who_know_it_and_kills_nobody_else(runs):
    """A shell, a pipe into cat: neither has a handler for USR2, and both would die of it."""
    (runs.jobs / "saver.sh").write_text("trap 'echo saved; exit 85' USR2; while true; do sleep 0.05; done")
    script = "set -o pipefail; bash saver.sh | cat; echo code $?; exit 85"
    done = runs.submit(runs.bash(script, **WARNED))
    assert done.returncode == 85
    assert runs.newest().log == "saved\ncode 85\n"


def test_a_program_that_knows_no_warning_ends_at_its_time_limit(runs):
    done = runs.submit(runs.bash("trap '' USR2 TERM; while true; do sleep 0.1; done", **WARNED))
    run = runs.newest()
    assert done.returncode == 137
    assert run.status()["verdict"]["category"] == "time limit"
    assert "did not end in time and was killed" in done.stdout
    assert not run.processes()


def test_two_resumes_at_the_same_moment_start_one_attempt(runs):
    runs.submit(runs.bash("[ -e go ] && exec sleep 600; touch go; exit 1"))
    run = runs.newest()
    both = [runs.open("resume", "--detach", run.id) for _ in range(2)]
    outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in both]
    assert sorted(process.returncode == 0 for process in both) == [False, True], outputs
    wait_for("attempt 2", lambda: (run.folder / "attempt-2").exists())
    runs.cpm("cancel")
    assert not (run.folder / "attempt-3").exists()
