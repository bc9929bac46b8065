"""What clusters do to jobs: each fault, what the user is told, what is lost, and that nothing is left behind.

On the sandbox: real Slurm, real containers, an ordinary user. Needs root and Debian's packages. A sandbox that is up
already is used, and stays; otherwise one is brought up. At most the steps since the last whole checkpoint may be lost.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from cluster_runs import IMAGE, ClusterRun, ClusterRuns
from local_runs import all_processes, command_line, environment_of, parent_of, wait_for

from cpm_cluster.sandbox import daemons, dockerd, gpus, image, sandbox
from cpm_cluster.sandbox.mounts import below
from cpm_cluster.sandbox.state import Node, Sandbox

STATE = Sandbox()
# So that a cut cable, or a slurmd that is away, is nobody else's: jobs of one node, of two, and those of a lost node.
ONE_NODE, TWO_NODES, LOST_NODE = "g[2004-2008]", "g[2001-2003,2006-2008]", "g[2001-2005]"
# For what needs most of a node's GPUs, or certain ports, while other jobs run; jobs of two nodes come later.
PREEMPTED_NODE, EMPTY_NODE = STATE.nodes[3], STATE.nodes[4]
EVERY = 20
# The newest checkpoint may still be being written when a rank dies; the next one is not begun before it is whole.
MOST_LOST = 2 * EVERY
SIGTERM_CODE, SIGKILL_CODE = 128 + signal.SIGTERM, 128 + signal.SIGKILL
SCANCELLED = f"It was cancelled in Slurm by {STATE.user}, not by cpm cancel."
DIFFICULT = {
    "COMMAS": "a,b,,c",
    "QUOTES": """it's "quoted\"""",
    "DOLLARS": "$HOME ${PATH} $(id) `id` $$",
    "SEMICOLONS": "a; b & c | d > e",
    "SPACES": "  two  inside  ",
    "UNICODE": "naïve 北京 ✓",
    "BACKSLASHES": r"a\nb\\c\ ",
    "EQUALS": "a=b=c",
    "HASH": "#1 # 2",
    "PERCENT": "%j %N 100%",
    "GLOBS": "* ? [a-z] ~ !",
    "EMPTY": "",
}
Story = Callable[[ClusterRuns], None]
SEE = """
import json, os, sys
with open(os.environ["CPM_RUN_DIR"] + "/seen.json", "w") as file:
    json.dump(dict(os.environ), file)
sys.exit(3)
"""
HOLD = """
nvidia-smi -L > "$CPM_RUN_DIR/gpus"
ls /dev/nvidia? > "$CPM_RUN_DIR/devices"
while [ ! -e "$CPM_RUN_DIR/go" ]; do sleep 0.1; done
"""
TAKE_PORTS = """
import socket, sys, time
doors = [socket.socket() for _ in sys.argv[1:]]
for door, port in zip(doors, sys.argv[1:]):
    door.bind(("127.0.0.1", int(port)))
    door.listen()
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def user(cluster: Sandbox) -> Iterator[ClusterRuns]:
    root = Path(tempfile.mkdtemp(prefix="faults-", dir=cluster.shared))
    root.chmod(0o755)
    made = ClusterRuns(cluster, root)
    yield made
    made.end_all()
    for path in below(root):
        subprocess.run(["umount", path], check=True)
    shutil.rmtree(root)
    sandbox.up(cluster, install=False, with_containers=True)  # what a failed test has left broken


def one_node(user: ClusterRuns, name: str, **changes: object) -> ClusterRun:
    """Start training on one node in a rootless Docker of its own."""
    changes = {"runtime": "docker-rootless", "slurm__exclude": ONE_NODE, **changes}
    return user.detached(user.job(name, **changes))


def two_nodes(user: ClusterRuns, name: str, exclude: str, **changes: object) -> ClusterRun:
    """Start training on two nodes, with podman."""
    changes = {"runtime": "podman", "resources__nodes": 2, "slurm__exclude": exclude, **changes}
    return user.detached(user.job(name, **changes))


def state_of(run: ClusterRun) -> tuple[str, int | None]:
    status = run.status()
    return status["state"], status["exit_code"]


def cause_of(run: ClusterRun) -> str:
    return str(run.status()["verdict"]["cause"])


def as_admin(*argv: str) -> str:
    """Stdout of a Slurm command of root that must succeed."""
    environment = {**os.environ, "SLURM_CONF": str(STATE.slurm_conf)}
    return subprocess.run(argv, env=environment, check=True, capture_output=True, text=True).stdout


# What a program sees, and how it ends


@pytest.fixture(scope="module")
def seen(user: ClusterRuns) -> dict[str, ClusterRun]:
    """A program that records its environment and exits 3, in each runtime; all at once."""
    changes = {
        "docker-rootless": {"image": IMAGE, "slurm__exclude": ONE_NODE},
        "docker": {"image": IMAGE, "slurm__nodelist": STATE.nodes[0].name},
        "podman": {"image": IMAGE, "slurm__exclude": ONE_NODE},
        "bare": {"slurm__exclude": ONE_NODE},
    }
    jobs = {
        name: user.command("python3", "-c", SEE, name=f"sees-{name}", runtime=name, env=DIFFICULT, **more)
        for name, more in changes.items()
    }
    return {name: user.detached(job) for name, job in jobs.items()}


RUNTIMES = ("docker-rootless", "docker", "podman", "bare")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_program_that_exits_3_makes_the_job_exit_3(user, seen, runtime):
    status = seen[runtime].await_end()

    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert status["verdict"]["cause"] == "The program ended with code 3."
    sacct = ("sacct", "--noheader", "--allocations", "--format=ExitCode", f"--jobs={seen[runtime].job_id}")
    wait_for("sacct", lambda: user.slurm(*sacct).split() == ["3:0"])
    seen[runtime].await_nothing_left()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_environment_of_a_job_arrives_intact(seen, runtime):
    seen[runtime].await_end()

    environment = seen[runtime].json("seen.json")

    assert {name: environment.get(name) for name in DIFFICULT} == DIFFICULT


def test_the_exit_code_of_a_job_that_is_followed_is_that_of_cpm_submit(user):
    done = user.submit(user.command("sh", "-c", "exit 3", name="followed"))

    assert done.returncode == 3, done.stderr
    assert "The program ended with code 3." in done.stdout


def test_a_newline_in_the_environment_is_refused_by_name(user):
    done = user.submit(user.command("true", name="poem", env={"POEM": "two\nlines"}), "--detach")

    assert done.returncode == 2
    assert "env.POEM" in done.stderr and "poem.yaml:" in done.stderr


SECRET = "hf_Zm9yLXRoZS10ZXN0"


@pytest.fixture(scope="module")
def trained(user: ClusterRuns) -> ClusterRun:
    """A training run with a difficult environment and a secret."""
    user.secrets(HUB_TOKEN=SECRET, OTHER="not asked for")
    run = one_node(user, "trained", env=DIFFICULT, secrets=["HUB_TOKEN"])
    run.await_step(EVERY + 1)
    return run


def test_every_rank_has_the_environment_and_the_secret(trained):
    for rank in (0, 1):
        found = dict(line.partition("=")[::2] for line in environment_of(trained.rank(rank)))

        assert {name: found.get(name) for name in DIFFICULT} == DIFFICULT
        assert found["HUB_TOKEN"] == SECRET
        assert "OTHER" not in found


def test_a_secret_is_in_no_record_no_command_line_and_nothing_that_slurm_tells(user, trained):
    job = trained.job_id
    transport = trained.folder / "attempt-1/node-0/environment"
    contents = {path: content for path, content in files_of(trained.folder) if path != transport}

    assert len(contents) > 20
    assert [path for path, content in contents.items() if SECRET.encode() in content] == []
    assert not transport.exists() or transport.stat().st_mode & 0o777 == 0o600
    assert [command_line(pid) for pid in all_processes() if SECRET in command_line(pid)] == []
    told = [user.slurm("scontrol", "--details", "show", "job", job)]
    told.append(user.slurm("scontrol", "write", "batch_script", job, "-"))
    told += [user.slurm("sacct", f"--jobs={job}", option) for option in ("--batch-script", "--env-vars")]
    assert "trained" in told[0] and "#SBATCH" in told[1]
    assert [text for text in told if SECRET in text] == []


def files_of(top: Path) -> Iterator[tuple[Path, bytes]]:
    """The files below a folder, but for those that the trainer renames or removes in this moment."""
    for folder, _, names in os.walk(top):
        for path in (Path(folder, name) for name in names):
            with suppress(FileNotFoundError):
                yield path, path.read_bytes()


def test_scancel_while_training_saves_and_leaves_nothing(user, trained):
    user.slurm("scancel", trained.job_id)

    status = trained.await_end()

    assert (status["state"], status["exit_code"]) == ("failed", SIGTERM_CODE)
    wait_for("verdict", lambda: cause_of(trained) == SCANCELLED)  # once accounting knows
    assert trained.checkpoint_step == trained.last_step
    trained.await_nothing_left()


def test_cpm_cancel_saves_and_cpm_resume_goes_on_from_there(user):
    run = one_node(user, "cancelled")
    run.await_step(EVERY + 1)

    assert user.cpm("cancel", run.id).stdout == f"{run.id}: cancelled\n"

    assert state_of(run) == ("cancelled", SIGTERM_CODE)
    step = run.last_step
    run.await_nothing_left()
    run.shorten_to(step + EVERY)
    assert user.cpm("resume", run.id, "--detach").returncode == 0
    status = run.await_end()
    assert (status["state"], status["attempt"]) == ("finished", 2)
    assert run.continued_after(2) == step
    run.await_nothing_left()


# GPUs


def test_two_jobs_on_one_node_have_four_gpus_each_and_do_not_touch_each_other(user):
    node = EMPTY_NODE
    half = {"image": IMAGE, "runtime": "docker-rootless", "resources__gpus_per_node": 4, "slurm__nodelist": node.name}
    jobs = [user.command("bash", "-c", HOLD, name=f"half-{side}", **half) for side in ("left", "right")]
    left, right = [user.detached(job) for job in jobs]
    for run in (left, right):
        wait_for("devices", lambda run=run: run.text("devices"))

    seen_by = [_uuids(run) for run in (left, right)]

    assert [len(uuids) for uuids in seen_by] == [4, 4]
    assert seen_by == [_allocated(user, run, node) for run in (left, right)]
    assert not seen_by[0] & seen_by[1]
    assert [len(run.text("devices").split()) for run in (left, right)] == [4, 4]
    assert user.cpm("cancel", left.id).returncode == 0
    left.await_nothing_left()
    assert right.status()["state"] == "running"
    (right.folder / "go").touch()
    assert right.await_end()["state"] == "finished"
    right.await_nothing_left()


def _uuids(run: ClusterRun) -> set[str]:
    return {line.split("UUID: ")[1].rstrip(")") for line in run.text("gpus").splitlines()}


def _allocated(user: ClusterRuns, run: ClusterRun, node: Node) -> set[str]:
    """UUIDs of the GPUs that Slurm has given to a job: GRES=gpu:4(IDX:0-1,6-7)."""
    told = user.slurm("scontrol", "--details", "show", "job", run.job_id)
    ranges = [part.split("-") for part in told.partition("(IDX:")[2].partition(")")[0].split(",")]
    indices = [index for bounds in ranges for index in range(int(bounds[0]), int(bounds[-1]) + 1)]
    return {gpus.gpu_uuid(node, index) for index in indices}


# The image


def test_scancel_while_the_image_is_loaded_leaves_nothing_and_the_next_job_loads_it(user):
    data_root = {"runtimes__docker-rootless__data_root": str(user.folder("fresh"))}
    where = {"image": IMAGE, "runtime": "docker-rootless", "cluster": user.cluster("fresh", **data_root)}
    job = user.command("true", name="loads", slurm__nodelist=STATE.nodes[1].name, **where)
    run = user.detached(job)
    run.await_phase("image")
    loading = f"docker load --input {image.folder(STATE)}"
    wait_for("docker load", lambda: any(loading in command_line(pid) for pid in run.processes()))

    user.slurm("scancel", run.job_id)

    status = run.await_end()
    assert (status["state"], status["exit_code"]) == ("failed", SIGTERM_CODE)
    wait_for("verdict", lambda: cause_of(run) == SCANCELLED)
    run.await_nothing_left()
    again = user.detached(job)
    assert again.await_end()["state"] == "finished"
    again.await_nothing_left()


def test_a_truncated_archive_is_named_before_docker_sees_it(user):
    folder = user.folder("truncated")
    whole = image.folder(STATE) / "cpmlive-flash-0.0.4.tar"
    broken = folder / whole.name
    with open(whole, "rb") as source, open(broken, "wb") as target:
        target.write(source.read(1_000_000))
    settings = {"image_folder": str(folder), "runtimes__docker-rootless__data_root": str(user.folder("empty"))}
    where = {"image": IMAGE, "runtime": "docker-rootless", "cluster": user.cluster("truncated", **settings)}
    run = user.detached(user.command("true", name="truncated", slurm__exclude=ONE_NODE, **where))

    status = run.await_end()

    assert (status["state"], status["exit_code"]) == ("failed", 3)
    size = f"{whole.stat().st_size:,}"
    assert f"image archive {broken} has 1,000,000 bytes instead of {size}" in status["verdict"]["cause"]
    assert "download it again" in status["verdict"]["cause"]
    run.await_nothing_left()


def test_a_full_disk_below_the_data_root_is_named(user):
    small = user.folder("small")
    options = f"size=300m,mode=700,uid={STATE.uid},gid={STATE.gid}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", small], check=True)
    cluster = user.cluster("small", **{"runtimes__docker-rootless__data_root": str(small)})
    where = {"image": IMAGE, "runtime": "docker-rootless", "cluster": cluster, "slurm__exclude": ONE_NODE}
    run = user.detached(user.command("true", name="full", **where))

    status = run.await_end()

    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert "no space left on device" in status["verdict"]["cause"]
    assert str(small) in " ".join(event["text"] for event in run.events() if event["kind"] == "finding")
    run.await_nothing_left()


def test_an_image_that_one_node_lacks_is_loaded_there(user):
    with_docker = STATE.nodes[: dockerd.NODES_WITH_DOCKER]
    socket = next(engine.socket for engine in dockerd.engines(STATE) if engine.name == with_docker[1].name)
    subprocess.run(["docker", "--host", f"unix://{socket}", "image", "rm", "--force", IMAGE], check=True)
    names = ",".join(node.name for node in with_docker)
    where = {"image": IMAGE, "runtime": "docker", "resources__nodes": 2, "slurm__nodelist": names}
    run = user.detached(user.command("sh", "-c", "hostname > $CPM_RUN_DIR/on-$NODE_RANK", name="lacks", **where))

    status = run.await_end()

    assert (status["state"], status["exit_code"]) == ("finished", 0)
    assert [run.text(f"on-{number}").strip() for number in (0, 1)] == names.split(",")
    run.await_nothing_left()


# The master port


@pytest.mark.parametrize("taken", [1, 8])
def test_a_master_port_that_is_taken(user, taken):
    node = EMPTY_NODE
    script = "echo $MASTER_PORT > $CPM_RUN_DIR/port"
    extra = {"slurm__nodelist": node.name, "slurm__extra": {"hold": ""}}
    run = user.detached(user.command("sh", "-c", script, name=f"taken-{taken}", **extra))
    port = 61000 + int(run.job_id) % 4536
    ports = map(str, range(port, port + taken))
    holder = subprocess.Popen([*node.enter, sys.executable, "-c", TAKE_PORTS, *ports], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"taken\n"

    user.slurm("scontrol", "release", run.job_id)

    status = run.await_end()
    holder.kill()
    holder.wait()
    if taken == 1:
        assert (status["state"], run.text("port").strip()) == ("finished", str(port + 1))
    else:
        assert (status["state"], status["exit_code"]) == ("failed", 3)
        assert f"ports {port} to {port + 7} of 127.0.0.1 are all taken" in status["verdict"]["cause"]
    run.await_nothing_left()


# By hand


def test_an_exported_script_gives_the_same_record(user):
    short = {"runtime": "docker-rootless", "slurm__exclude": ONE_NODE, "training__steps": 2 * EVERY}
    job = user.job("exported", **short)
    by_hand = user.exported(job, user.folder("scripts") / "job.sbatch")
    submitted = user.detached(job)

    ends = [run.await_end() for run in (by_hand, submitted)]

    told = [(end["state"], end["exit_code"], end["attempt"], end["verdict"]) for end in ends]
    assert told == [("finished", 0, 1, None)] * 2
    assert _files(by_hand) == _files(submitted)
    for run in (by_hand, submitted):
        assert run.checkpoint_step == run.last_step == 2 * EVERY
        run.await_nothing_left()


def _files(run: ClusterRun) -> set[str]:
    """Names of a run's files, as the same run would have them at another time and place."""
    found = [path.relative_to(run.folder) for path in run.folder.rglob("*") if path.is_file()]
    names = {str(path) for path in found if path.parts[0] != "submitit" and not path.name.startswith("events.out.")}
    jobs = {f"slurm-{job}.log": "slurm-JOB.log" for job in run.job_ids}
    nodes = {
        f"{folder}/{path.name}"
        for folder in ("events", "exit", "telemetry")
        for path in (run.folder / folder).glob("g2*")
    }
    return {jobs.get(name, "NODE" if name in nodes else name) for name in names}


# A job that goes on by itself. That takes long: these are begun first, and waited for here.


def rank(run: ClusterRun) -> int:
    return run.rank(1)


def torchrun(run: ClusterRun) -> int:
    return run.torchrun


def agent(run: ClusterRun) -> int:
    return run.agent_on(run.nodes[0])


def guard(run: ClusterRun) -> int:
    return parent_of(agent(run))


def docker_daemon(run: ClusterRun) -> int:
    return run.dockerd


KILLED_BY_SOMEBODY = "killed (SIGKILL) by somebody, or by the kernel for lack of host memory."


def after_kill(victim: Callable[[ClusterRun], int], category: str, cause: str) -> Story:
    """A process is killed; the job ends, leaves nothing, and goes on from its last checkpoint."""

    def story(user: ClusterRuns) -> None:
        run = one_node(user, victim.__name__)
        run.await_checkpoint()
        node = run.nodes[0]
        os.kill(victim(run), signal.SIGKILL)
        goes_on(run, category, cause.format(node=node))

    return story


def goes_on(run: ClusterRun, category: str, cause: str, saved: bool = False) -> None:
    """Nothing is left of the first attempt; the second goes on from its newest whole checkpoint, not long ago."""
    with run.between_attempts():
        run.await_nothing_left(queued=True)
        checkpoint, step = run.checkpoint_step, run.last_step
        as_admin("scontrol", "update", f"jobid={run.job_id}", "timelimit=60")  # which may have been cut short
    continued = run.continued_after(2)
    ending = next(event for event in run.lines("events/batch.jsonl") if event["kind"] == "ending")
    assert (ending["attempt"], ending["category"]) == (1, category)
    assert ending["cause"].startswith(cause)
    assert continued == checkpoint
    assert step - checkpoint <= (0 if saved else MOST_LOST)
    assert run.status()["state"] == "running"
    assert run.runs.cpm("cancel", run.id).returncode == 0
    run.await_nothing_left()


def time_limit(user: ClusterRuns) -> None:
    """Near once training has begun, however long that took. Slurm counts in minutes, and warns half of one early."""
    run = one_node(user, "time-limit", signal_lead="1m")
    run.await_step(1)
    user.slurm("scontrol", "update", f"jobid={run.job_id}", f"timelimit={minutes_used(run) + 2}")
    run.await_job("PENDING")
    record = run.json(f"exit/{run.first_node}.json")
    assert (record["exit_code"], record["stopped_by"], record["killed"]) == (85, "SIGUSR2", False)
    goes_on(run, "time limit", "It saved and stopped before its time limit.", saved=True)


def minutes_used(run: ClusterRun) -> int:
    """Whole minutes that a job has been running for, less than an hour."""
    told = as_admin("squeue", "--noheader", f"--jobs={run.job_id}", "--format=%M")  # minutes:seconds
    return int(told.partition(":")[0])


def preemption(user: ClusterRuns) -> None:
    node = PREEMPTED_NODE.name
    run = one_node(user, "preempted", slurm__partition="preempt", slurm__exclude=None, slurm__nodelist=node)
    run.await_step(EVERY + 1)
    wanted = ("--partition=gpu1", f"--nodelist={node}", "--gres=gpu:7", "--output=/dev/null", "--wrap=sleep 1")
    user.slurm("sbatch", *wanted)
    goes_on(run, "preempted", "Slurm preempted it for another job.", saved=True)


def lost_node(user: ClusterRuns) -> None:
    """The cable of one of two nodes is cut for good: Slurm gives the job another node."""
    run = two_nodes(user, "lost-node", LOST_NODE)
    run.await_checkpoint()
    lost = second_node(run)
    plug(lost, "down")
    try:
        with run.between_attempts():
            checkpoint, step = run.checkpoint_step, run.last_step
        assert run.continued_after(2) == checkpoint
        assert step - checkpoint <= MOST_LOST
        assert lost.name not in run.nodes
    finally:
        plug(lost, "up")
        daemons.slurmd(STATE, lost).stop()
        daemons.slurmd(STATE, lost).start()
    ending = next(event for event in run.lines("events/batch.jsonl") if event["kind"] == "ending")
    assert (ending["category"], ending["node"]) == ("node", lost.name)
    assert user.cpm("cancel", run.id).returncode == 0
    await_node("idle", lost)
    # what was on the lost node is swept by the next job there
    next_one = {"image": IMAGE, "runtime": "podman", "slurm__nodelist": lost.name}
    assert user.detached(user.command("true", name="sweeps", **next_one)).await_end()["state"] == "finished"
    run.await_nothing_left()


def second_node(run: ClusterRun) -> Node:
    """Of a job that runs on two."""
    name = run.nodes[1]
    return next(node for node in STATE.nodes if node.name == name)


def await_node(state: str, node: Node) -> None:
    """Wait until Slurm has a node in a state."""
    argv = ("sinfo", "--noheader", f"--nodes={node.name}", "--partition=gpu1", "--format=%T")
    wait_for(f"{node.name} {state}", lambda: as_admin(*argv).strip() == state)


def plug(node: Node, way: str) -> None:
    """Pull or plug the cable of a node."""
    subprocess.run(["ip", "link", "set", node.link, way], check=True)


STORIES: dict[str, Story] = {
    "a node is lost": lost_node,
    "the time limit": time_limit,
    "preemption": preemption,
    "kill -9 of a rank": after_kill(rank, "killed", f"Rank 1 was {KILLED_BY_SOMEBODY}"),
    "kill -9 of torchrun": after_kill(torchrun, "killed", f"The launcher (torchrun) was {KILLED_BY_SOMEBODY}"),
    "kill -9 of the agent": after_kill(agent, "killed", "The node agent on {node} was killed (SIGKILL)."),
    "kill -9 of its guard": after_kill(guard, "killed", "The node agent on {node} was killed (SIGKILL)."),
    "kill -9 of dockerd": after_kill(docker_daemon, "node", "Node {node} could not run it: its Docker daemon ended"),
}


@pytest.fixture(scope="module", autouse=True)
def told(request: pytest.FixtureRequest, user: ClusterRuns) -> Iterator[dict[str, Future[None]]]:
    """The stories that were selected, three at a time, and beside the other tests."""
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    names = [name for name in STORIES if name in {params.get("fault") for params in asked}]
    with ThreadPoolExecutor(3) as pool:
        yield {name: pool.submit(STORIES[name], user) for name in names}


@pytest.mark.parametrize("fault", STORIES)
def test_a_job_goes_on_by_itself_after(fault, told):
    told[fault].result()


# What a running job does not notice


@pytest.fixture(scope="module")
def steady(user: ClusterRuns) -> ClusterRun:
    """Training on two nodes, with the last four of the eight for jobs that lose one."""
    run = two_nodes(user, "steady", TWO_NODES)
    run.await_step(EVERY)
    return run


def trains_on(run: ClusterRun, steps: int = EVERY) -> None:
    """It does more steps now, in its first attempt."""
    step = run.last_step
    wait_for("further steps", lambda: run.last_step >= step + steps)
    status = run.status()
    assert (status["state"], status["attempt"]) == ("running", 1)


def test_a_job_does_not_notice_that_slurmctld_is_restarted(user, steady):
    daemons.slurmctld(STATE).stop()
    step = steady.last_step
    wait_for("steps without slurmctld", lambda: steady.last_step > step)

    away = steady.status()

    daemons.slurmctld(STATE).start()
    assert away["state"] == "running"
    trains_on(steady)
    steady.await_job("RUNNING")


def test_a_job_does_not_notice_that_slurmd_is_killed(user, steady):
    node = second_node(steady)
    os.kill(daemons.slurmd(STATE, node).file.pid, signal.SIGKILL)

    trains_on(steady, steps=5)  # a node without slurmd is lost after a minute

    daemons.slurmd(STATE, node).start()
    trains_on(steady)
    steady.await_job("RUNNING")


def test_neither_a_job_nor_its_user_needs_sacct(user, steady):
    daemons.slurmdbd(STATE).stop()
    few = user.folder("few-programs")
    for name in ("squeue", "sinfo", "scontrol"):
        (few / name).symlink_to(str(shutil.which(name)))
    without_sacct = {"PATH": f"{user.bin}:{few}"}
    run = user.detached(user.command("true", name="unaccounted"))
    run.await_end()

    told = user.cpm("status", run.id, env=without_sacct)
    listed = user.cpm("runs", env=without_sacct)

    daemons.slurmdbd(STATE).start()
    assert f"{run.id}: finished, exit code 0" in told.stdout, told.stderr
    assert run.id in listed.stdout and steady.id in listed.stdout, listed.stderr
    trains_on(steady)


def test_a_job_goes_on_after_the_link_of_one_node_was_cut_for_half_a_minute(user, steady):
    node = second_node(steady)
    plug(node, "down")
    time.sleep(30)
    step = steady.last_step
    plug(node, "up")

    wait_for("steps after the cut", lambda: steady.last_step > step)
    trains_on(steady)


def test_nothing_was_lost_by_all_that(user, steady):
    assert user.cpm("cancel", steady.id).stdout == f"{steady.id}: cancelled\n"

    status = steady.status()

    assert (status["state"], status["attempt"]) == ("cancelled", 1)
    steps = [row["step"] for row in steady.lines("metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1))
    assert steady.checkpoint_step == steps[-1]
    records = [steady.json(f"exit/{path.name}") for path in (steady.folder / "exit").iterdir()]
    assert [(record["exit_code"], record["clean"]) for record in records] == [(SIGTERM_CODE, True)] * 2
    steady.await_nothing_left()
