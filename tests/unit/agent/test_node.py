"""The agent's part in a run: what it starts, how it passes requests on, and what the exit record says.

Each agent is a process of its own with the run's directory, and shorter times than a cluster has.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import ANY_PROGRAM, TORCHRUN, container
from processes import ROOT, is_gone, parent_of, wait_for

from cpm_cluster.agent.process_tree import end_all, processes_of_run
from cpm_cluster.launch.plan import Program
from cpm_cluster.runs.records import read_events
from cpm_cluster.runs.run import new_run_id

AGENT = """
import sys
from pathlib import Path
from cpm_cluster.agent import guard, node
node.GRACE_AFTER_TERM_S, node.GRACE_OF_STRAGGLERS_S, node.GRACE_OF_THE_LATE_S = 1.0, 0.3, 0.3
guard.GRACE_AFTER_AGENT_S = 0.3
agent = node.NodeAgent(Path(sys.argv[1]))
sys.exit(guard.guarded(agent.run, agent.clean_up_after))
"""
# In place of torchrun: the arguments of the plan's program are the script that it runs.
LAUNCHER = '#!/bin/sh\nwhile [ "$1" != -m-trainer ]; do shift; done\nshift\nexec bash -c "$1"\n'


class Agent:
    """An agent at work on a run."""

    def __init__(self, run, environment):
        self.run, self.root = run, run.files.root
        surroundings = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "CPM_RUN_ID": run.id, **environment}
        self.process = subprocess.Popen([sys.executable, "-c", AGENT, str(self.root)], env=surroundings)

    @property
    def log(self):
        """What the program printed in the newest attempt."""
        logs = sorted(self.root.glob("attempt-*/node-0/node.log"))
        return logs[-1].read_text() if logs else ""

    @property
    def pid(self):
        """The agent itself; its process here is the guard."""
        return next(e["pid"] for e in reversed(read_events(self.root / "events")) if e.get("phase") == "prepare")

    def send(self, number, word="ready"):
        """Signal it once the program has printed something."""
        wait_for(lambda: word in self.log)
        self.process.send_signal(number)
        return self

    def ended(self):
        """The exit code, and the exit record."""
        code = self.process.wait(30)
        (path,) = (self.root / "exit").glob("*.json")
        return code, json.loads(path.read_text())


@pytest.fixture
def agent(made_run, tmp_path):
    """Start agents: `agent("exit 3")` for any program, `agent("…", trainer=True)` for one in place of torchrun."""
    started = []
    launcher = tmp_path / "launcher"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)

    def start(script, trainer=False, run=None, environment=None, **plan):
        if run is None:
            program = Program("torchrun", str(launcher), 1, ("-m-trainer", script))
            other = Program(ANY_PROGRAM.launcher, "", 1, ("bash", "-c", script))
            settings = {"program": program if trainer else other, **plan}
            run = made_run(new_run_id("agent"), trainer=trainer, **settings).run
            run.files.code.mkdir()
        started.append(Agent(run, environment or {}))
        return started[-1]

    yield start
    for each in started:
        end_all(lambda each=each: processes_of_run(each.run.id), 0)
        each.process.wait()


WAIT = "while true; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
)
def test_the_programs_end_is_the_agents(agent, script, code):
    given, record = agent(script).ended()
    assert given == record["exit_code"] == code
    assert (record["attempt"], record["stopped_by"], record["killed"], record["clean"]) == (1, None, False, True)
    assert record["started"] <= record["ended"]


STORY = ["prepare", "training", "cleanup", "exit"]


def test_the_events_tell_the_story(agent):
    worker = agent("exit 7")
    worker.ended()
    events = read_events(worker.root / "events")
    told = [e.get("phase", e["kind"]) for e in events]
    assert [word for word in told if word in STORY] == STORY
    assert events[-1]["exit_code"] == 7 and {e["attempt"] for e in events} == {1}


def test_the_program_finds_its_run_in_the_environment_and_stands_in_its_code(agent):
    worker = agent(
        'echo "$CPM_RUN_ID,$CPM_ATTEMPT,$NODE_RANK,$MASTER_ADDR,${RANK-none}"; pwd', environment={"RANK": "5"}
    )
    worker.ended()
    assert worker.log.splitlines() == [f"{worker.run.id},1,0,127.0.0.1,none", str(worker.root / "code")]


def test_a_program_that_is_told_to_end_may_clean_up(agent):
    code, record = agent(f"trap 'echo saved; exit 9' TERM; echo ready; {WAIT}").send(signal.SIGTERM).ended()
    assert (code, record["stopped_by"], record["killed"]) == (9, "SIGTERM", False)


def test_a_program_that_does_not_listen_is_killed_in_the_end(agent):
    worker = agent(f"trap '' TERM; echo ready; {WAIT}").send(signal.SIGTERM)
    code, record = worker.ended()
    assert (code, record["killed"], record["clean"]) == (137, True, True)
    assert len([e for e in read_events(worker.root / "events") if e["kind"] == "killed"]) == 1


def test_a_second_request_to_end_does_not_wait(agent):
    worker = agent(f"trap '' TERM; echo ready; {WAIT}").send(signal.SIGTERM)
    wait_for(lambda: any(e["kind"] == "signal" for e in read_events(worker.root / "events")))
    worker.process.send_signal(signal.SIGTERM)
    assert worker.ended()[0] == 137


def test_a_warning_is_answered_by_the_program_itself(agent):
    code, record = agent(f"trap 'exit 85' USR2; echo ready; {WAIT}").send(signal.SIGUSR2).ended()
    assert (code, record["stopped_by"]) == (85, "SIGUSR2")


def test_a_program_that_knows_no_warning_goes_on_until_its_time_is_up(agent):
    worker = agent(f"echo ready; {WAIT}", signal_lead_s=1).send(signal.SIGUSR2)
    code, record = worker.ended()
    assert (code, record["stopped_by"], record["killed"]) == (143, "SIGUSR2", True)


def test_the_reason_to_stop_is_the_first_one(agent):
    """The time limit warns, and ends what has not stopped."""
    worker = agent(f"trap 'echo warned' USR2; trap 'exit 9' TERM; echo ready; {WAIT}").send(signal.SIGUSR2)
    code, record = worker.send(signal.SIGTERM, word="warned").ended()
    assert (code, record["stopped_by"]) == (9, "SIGUSR2")


TRAINER = """
trap 'echo signalled' TERM USR2
echo ready
while [ ! -e "$CPM_RUN_DIR/control/stop" ]; do sleep 0.05; done
echo '{"outcome": "stopped"}' > "$CPM_RUN_DIR/outcome.json"
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR2, 85), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_trainer_is_asked_to_stop_by_a_file_that_every_rank_sees(agent, number, code):
    worker = agent(TRAINER, trainer=True).send(number)
    assert worker.ended()[0] == code
    assert "signalled" not in worker.log


def test_a_trainer_that_finishes_nevertheless_has_finished(agent):
    script = TRAINER.replace("stopped", "finished")
    code, record = agent(script, trainer=True).send(signal.SIGTERM).ended()
    assert (code, record["stopped_by"]) == (0, "SIGTERM")


def test_what_the_user_can_correct_ends_with_2_whatever_torchrun_says(agent):
    worker = agent("exit 1", trainer=True)
    assert worker.ended()[0] == 1
    script = "mkdir -p errors; echo '{\"user_error\": true}' > errors/rank-1.json; exit 1"
    worker = agent(script, trainer=True)
    assert worker.ended()[0] == 2


def test_how_an_earlier_attempt_ended_is_not_how_this_one_does(agent, made_run):
    made = made_run(new_run_id("agent"), program=Program("torchrun", "/no/such/launcher", 2, TORCHRUN.arguments))
    made.file("errors/rank-0.json", {"user_error": True}).file("outcome.json", {"outcome": "stopped"})
    made.file("control/stop", "")
    made.run.files.code.mkdir()
    assert agent("", run=made.run).ended()[0] == 3
    assert not list(made.run.files.errors.iterdir())
    assert not made.run.files.outcome.exists() and not made.run.files.stop_request.exists()


def test_the_trainer_does_not_import_from_the_users_files(agent):
    worker = agent("pwd", trainer=True)
    worker.ended()
    assert worker.log == f"{worker.root}\n"


def test_a_program_that_cannot_be_run_is_an_error_of_the_node(agent):
    worker = agent("", program=Program("none", "", 1, ("no-such-program",)))
    assert worker.ended()[0] == 3
    (error,) = [e for e in read_events(worker.root / "events") if e["kind"] == "error"]
    assert error["message"] == "no-such-program cannot be run on this node: No such file or directory"


def test_gpus_that_are_not_there_are_an_error_of_the_node_and_recorded(agent):
    worker = agent("", gpus_per_node=8, container=container(), runtime="docker")
    assert worker.ended()[0] == 3
    (error,) = [e for e in read_events(worker.root / "events") if e["kind"] == "error"]
    assert error["message"].startswith("nvidia-smi -L fails on ")


def test_whoever_is_told_to_end_before_it_has_started_its_program_does_not_start_it(made_run, tmp_path):
    run = made_run(trainer=False, program=Program("none", "", 1, ("touch", str(tmp_path / "started")))).run
    run.files.code.mkdir()
    early = """
import os, signal, sys
from pathlib import Path
from cpm_cluster.agent.node import NodeAgent
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(NodeAgent(Path(sys.argv[1])).run())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", early, str(run.files.root)], env=environment)
    assert done.returncode == 143
    (record,) = (json.loads(path.read_text()) for path in (run.files.root / "exit").iterdir())
    assert (record["exit_code"], record["stopped_by"]) == (143, "SIGTERM")
    assert not (tmp_path / "started").exists()


def test_what_the_program_leaves_is_ended_with_it(agent):
    worker = agent("(setsid bash -c 'trap \"\" TERM; echo $$; sleep 60' &); (sleep 60 & echo $!); sleep 0.3; exit 4")
    code, record = worker.ended()
    assert (code, record["clean"]) == (4, True)
    left = [int(pid) for pid in worker.log.split()]
    assert len(left) == 2 and all(map(is_gone, left))


def test_orphans_that_have_ended_do_not_pile_up_while_the_program_runs(agent):
    worker = agent(f"for i in 1 2 3 4 5; do (true &); done; sleep 0.5; echo ready; trap 'exit 0' TERM; {WAIT}")
    wait_for(lambda: "ready" in worker.log)
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
    wait_for(lambda: len(children.read_text().split()) == 1)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.ended()[0] == 0


def test_the_guard_cleans_up_after_an_agent_that_was_killed(agent):
    worker = agent(f"trap '' TERM; echo ready; echo $$; {WAIT}")
    wait_for(lambda: worker.log.count("\n") == 2)
    program = int(worker.log.split()[1])
    assert parent_of(worker.pid) == worker.process.pid
    os.kill(worker.pid, signal.SIGKILL)
    code, record = worker.ended()
    assert (code, record["exit_code"], record["clean"]) == (137, 137, True)
    assert is_gone(program)
    (told,) = [event for event in read_events(worker.root / "events") if event["kind"] == "agent_killed"]
    assert told["signal"] == "SIGKILL"


def test_the_guard_removes_the_container_of_an_agent_that_was_killed(agent, made_run, tmp_path):
    """With a stand-in for docker: its container goes on when its client is killed, as a real one's does."""
    calls = tmp_path / "calls"
    docker = tmp_path / "docker"
    docker.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n[ "$1" != run ] || '
        "{ echo abc > $(echo \"$@\" | sed 's/.*--cidfile=\\([^ ]*\\).*/\\1/'); echo ready; exec sleep 60; }\n"
    )
    docker.chmod(0o755)
    box = container(image="img:1", shm_bytes=1)
    run = made_run(new_run_id("agent"), trainer=False, container=box, runtime="docker").run
    run.files.code.mkdir()
    worker = agent("", run=run, environment={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    wait_for(lambda: "ready" in worker.log)
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.ended()[0] == 137
    assert "rm --force --volumes abc" in calls.read_text().splitlines()
    assert [path.name for path in worker.root.glob("attempt-1/node-0/*")] == ["node.log"]


def test_the_agent_ends_when_its_guard_is_killed(agent):
    worker = agent(f"trap 'exit 9' TERM; echo ready; {WAIT}")
    wait_for(lambda: "ready" in worker.log)
    worker.process.kill()
    record = wait_for(lambda: list((worker.root / "exit").glob("*.json")))[0]
    found = json.loads(record.read_text())
    assert (found["exit_code"], found["stopped_by"]) == (9, "SIGTERM")


def test_an_attempt_gives_way_to_the_next_one(agent):
    """The node was cut off, Slurm has started the job again elsewhere, and now the node is back."""
    worker = agent(f"echo ready; {WAIT}")
    wait_for(lambda: "ready" in worker.log)
    (worker.root / "attempt-2").mkdir()
    code, record = worker.ended()
    assert (code, record["killed"]) == (143, True)
    assert [event for event in read_events(worker.root / "events") if event["kind"] == "superseded"]


def test_a_wrong_command_line():
    module = [sys.executable, "-m", "cpm_cluster.agent"]
    done = subprocess.run(module, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "usage: python PACKAGE RUN_DIR [begin | end CODE | clean]\n")
