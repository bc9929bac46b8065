"""Following a run on a terminal: the live display, Ctrl-C, and a window that is closed."""

from __future__ import annotations

import re
import subprocess

from local_runs import ESCAPE_CODES, ONE_RANK, wait_for

WAITING = "echo started; trap 'exit 9' TERM; while [ ! -e go ]; do sleep 0.05; done"


def test_the_display_shows_where_a_training_stands_and_ctrl_c_may_leave_it_running(runs, terminal):
    screen = terminal("cpm-submit", runs.job(training__steps=1_000_000, training__log_every=50, resources=ONE_RANK))
    screen.await_text("starting", "loading", "training", "step ", "/1000000", "loss ", "tokens/s", " left", "━")
    assert re.search(r"step \d+/1000000 +\d:\d\d:\d\d", screen.text)  # time since it began
    assert re.search(r"loss \d+\.\d{3} · [\d,]+ tokens/s · .* left", screen.text)
    screen.press_ctrl_c()
    screen.await_text("Leave it running, or cancel it (Ctrl-C again)? [leave]")
    screen.type("leave")
    run = runs.newest()
    assert screen.await_exit() == 130
    assert f"{run.id} goes on" in screen.text and f"cpm logs -f {run.id}" in screen.text
    assert screen.raw.count("\x1b[?25h") >= screen.raw.count("\x1b[?25l") > 0  # the cursor is shown again
    step = run.status()["progress"]["step"]
    run.await_step(step + 1)
    runs.cpm("cancel")


def test_a_second_ctrl_c_cancels(runs, terminal):
    screen = terminal("cpm-submit", runs.bash(WAITING))
    screen.await_text("training")
    run = runs.newest()
    run.await_log("started")
    screen.press_ctrl_c()
    screen.await_text("Leave it running")
    screen.press_ctrl_c()
    assert screen.await_exit() == 130
    assert "cancelling" in screen.text and f"{run.id}: cancelled" in screen.text
    assert (run.status()["state"], run.status()["exit_code"]) == ("cancelled", 9)
    assert not run.processes()


def test_cancel_may_be_typed_and_enter_leaves(runs, terminal):
    screen = terminal("cpm-submit", runs.bash(WAITING))
    screen.await_text("training")
    runs.newest().await_log("started")
    screen.press_ctrl_c()
    screen.await_text("Leave it running")
    screen.type("")
    assert screen.await_exit() == 130
    assert runs.newest().status()["state"] == "running"

    follower = terminal("cpm", "logs", "-f")
    follower.await_text("started")
    follower.press_ctrl_c()
    assert follower.await_exit() == 130
    assert runs.newest().status()["state"] == "running"
    runs.cpm("cancel")


def test_ctrl_c_while_the_run_is_handed_over_asks_once_it_is(runs, terminal):
    screen = terminal("cpm-submit", runs.bash(WAITING))
    wait_for("run directory", lambda: runs.runs_dir.exists() and runs.all())
    screen.press_ctrl_c()
    screen.await_text("Leave it running")
    screen.type("cancel")
    assert screen.await_exit() == 130
    assert runs.newest().status()["state"] == "cancelled"


def test_a_closed_window_leaves_the_run_alone(runs, terminal):
    screen = terminal("cpm-submit", runs.bash(WAITING))
    screen.await_text("training")
    run = runs.newest()
    run.await_log("started")
    screen.close()
    assert screen.await_exit() == -1  # SIGHUP
    assert run.status()["state"] == "running"
    (run.folder / "code" / "go").touch()
    assert run.await_end()["state"] == "finished"


def test_whoever_submitted_may_be_killed_while_the_run_is_handed_over(runs):
    submitter = subprocess.Popen(runs._argv("cpm-submit", (runs.bash("exit 3"),)), env=runs.environment, cwd=runs.jobs)
    handing_over = wait_for("run", lambda: runs.runs_dir.exists() and runs.all())[0]
    wait_for("hand over", lambda: handing_over.processes())
    submitter.kill()
    submitter.wait()
    assert handing_over.await_end()["exit_code"] == 3


def test_no_color_takes_the_colours_away(runs, terminal):
    colour = re.compile(r"\x1b\[[0-9;]*(3[0-7]|38|4[0-7]|48|9[0-7])[0-9;]*m")
    job = runs.bash(WAITING)
    screens = [terminal("cpm-submit", job), terminal("cpm-submit", job, NO_COLOR="1")]
    for screen in screens:
        screen.await_text("training")
    for run in runs.all():
        (run.folder / "code" / "go").touch()
    assert [screen.await_exit() for screen in screens] == [0, 0]
    assert colour.search(screens[0].raw) and not colour.search(screens[1].raw)


def test_a_narrow_terminal_keeps_the_phase_and_the_step(runs, terminal):
    screen = terminal("cpm-submit", runs.bash(WAITING), columns=30)
    screen.await_text("training")
    (runs.newest().folder / "code" / "go").touch()
    assert screen.await_exit() == 0


def test_a_terminal_that_knows_no_bars_gets_a_summary(runs):
    done = runs.submit(runs.bash("exit 3"), env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 3 and "failed (exit code 3)" in done.stdout
    assert not ESCAPE_CODES.search(done.stdout)


def test_a_detached_run_says_what_next_on_a_terminal(runs, terminal):
    screen = terminal("cpm-submit", runs.bash(WAITING), "--detach")
    assert screen.await_exit() == 0
    run = runs.newest()
    assert screen.text.splitlines()[0] == run.id
    assert f"cpm logs -f {run.id}" in screen.text and f"cpm cancel {run.id}" in screen.text
    runs.cpm("cancel")


def test_streams_that_the_shell_has_closed(runs):
    """As cron and some supervisors start programs."""
    job = runs.bash("exit 3")
    for redirections in ("<&-", "<&- >&-", "<&- >&- 2>&-"):
        argv = ["bash", "-c", f'"$0" "$1" {redirections}', runs._argv("cpm-submit", ())[0], str(job)]
        done = subprocess.run(argv, env=runs.environment, cwd=runs.jobs, capture_output=True, text=True)
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr and "defect" not in done.stderr
