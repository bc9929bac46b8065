"""A rootless dockerd of the job's own: it comes up or says why not, disturbs no other, and leaves nothing.

dockerd-rootless.sh, rootlesskit and docker are stand-ins: what the real ones do, only they can tell.
"""

from __future__ import annotations

import os
import time

import pytest
from processes import is_gone, wait_for

from cpm_cluster.agent import rootless_docker
from cpm_cluster.agent.rootless_docker import RootlessDocker, data_root_base
from cpm_cluster.agent.surroundings import NodeError
from cpm_cluster.launch.plan import NodeFacts

# The daemon's socket is a file here; its children are a containerd, as dockerd has one.
UP = """\
sleep 300 &
echo "$! $$" > {state}/pids
printf '%s\\0' "$@" > {state}/argv
env > {state}/environment
touch "$XDG_RUNTIME_DIR/docker.sock"
wait
"""
DEAF = "trap '' TERM\n" + UP.replace("sleep 300 &", "(trap '' TERM; while :; do sleep 1; done) &").replace(
    "wait\n", "while :; do wait; done\n"
)
DOCKER = """\
echo "$DOCKER_HOST $*" >> {state}/asked
[ -e "${{DOCKER_HOST#unix://}}" ] && echo '[name=seccomp,profile=default name=rootless]'
"""
# Docker 20.10's own words, shortened, for a storage driver that is not there.
LAST_WORDS = """\
+ exec dockerd --storage-driver error
time="2026-11-25T14:07:29Z" level=warning msg="Running experimental build: error ahead"
time="2026-11-25T14:07:29Z" level=error msg="Failed to GetDriver graph" driver=nonsense
time="2026-11-25T14:07:29Z" level=info msg="stopping event stream" error="context canceled"
{reason}
time="2026-11-25T14:07:29Z" level=info msg="[core] Channel Connectivity change to SHUTDOWN" module=grpc
[rootlesskit:child ] error: command [dockerd-rootless.sh --iptables=false] exited: exit status 1
[rootlesskit:parent] error: child exited: exit status 1
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A node: its folders, and stand-ins on PATH that a test may replace."""
    made = Site(tmp_path)
    monkeypatch.setenv("PATH", f"{made.bin}:/usr/bin:/bin")
    monkeypatch.setattr(rootless_docker, "RUNTIME_FOLDERS", (made.runtime,))
    yield made
    for pid in made.pids():
        if not is_gone(pid):
            os.kill(pid, 9)


class Site:
    def __init__(self, folder):
        self.bin, self.runtime, self.state = folder / "bin", folder / "r", folder / "state"
        for each in (self.bin, self.runtime, self.state):
            each.mkdir()
        self.data_root = str(folder / "data-{uid}")
        self.has("dockerd-rootless.sh", UP)
        self.has("docker", DOCKER)
        self.has("rootlesskit", 'echo "$@" >> {state}/rootlesskit\nexec "$@"\n')

    def has(self, name, script):
        """A program of this node, as a shell script."""
        program = self.bin / name
        program.write_text("#!/bin/bash\n" + script.format(state=self.state), "utf-8")
        program.chmod(0o755)

    def pids(self):
        """The newest daemon and its child."""
        file = self.state / "pids"
        return [int(pid) for pid in file.read_text().split()] if file.exists() else []

    def said(self, name):
        """What a stand-in noted."""
        return (self.state / name).read_text("utf-8")


@pytest.fixture
def daemon(site, tmp_path):
    """Daemons of jobs; each is stopped at the end."""
    made = []

    def make(job="7", name="g2001", index=0):
        node = NodeFacts(name, index, job, 1, "127.0.0.1", "61000", (), "", "")
        made.append(RootlessDocker(node, tmp_path / f"dockerd-{job}.log"))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture
def plan(made_run, site):
    return made_run(runtime="docker-rootless", data_root=site.data_root).run.plan


def test_it_starts_with_folders_and_a_socket_of_its_own(daemon, plan, site):
    docker = daemon()
    docker.start(plan)
    words = site.said("argv").split("\0")
    assert words[words.index("--data-root") + 1] == f"{data_root_base(plan)}/g2001/0"
    assert words[words.index("--exec-root") + 1] == f"{docker.folder}/x"
    assert "native.cgroupdriver=cgroupfs" in words
    environment = dict(line.partition("=")[::2] for line in site.said("environment").splitlines())
    assert environment["XDG_RUNTIME_DIR"] == str(docker.folder)
    assert f"--state-dir={docker.folder}/rootlesskit" in environment["DOCKERD_ROOTLESS_ROOTLESSKIT_FLAGS"].split()
    assert docker.folder.stat().st_mode & 0o777 == 0o700
    assert str(os.getuid()) in str(data_root_base(plan))


def test_docker_is_led_to_it_and_asked_until_it_answers(daemon, plan, site):
    site.has("dockerd-rootless.sh", "sleep 0.5\n" + UP)
    docker = daemon()
    docker.start(plan)
    questions = site.said("asked").splitlines()
    assert {tuple(question.split()[:2]) for question in questions} == {(f"unix://{docker.folder}/docker.sock", "info")}
    assert len(questions) > 1


def test_its_sockets_have_short_paths_whatever_the_node_is_called(daemon, monkeypatch):
    """unix(7) allows 108 bytes; containerd's socket for debugging has the longest path."""
    monkeypatch.undo()
    folder = daemon(job="123456789", name="ip-10-0-0-1." + "x" * 200, index=1023).folder
    assert len(f"{folder}/x/containerd/containerd-debug.sock") < 108


def test_one_that_does_not_answer_is_given_up(daemon, plan, site, monkeypatch):
    monkeypatch.setattr(rootless_docker, "START_PATIENCE_S", 0.5)
    site.has("docker", "exit 1\n")
    docker = daemon()
    with pytest.raises(NodeError, match=r"^rootless dockerd does not answer after 0 s: it said nothing\n"):
        docker.start(plan)
    assert docker.stop()
    assert all(is_gone(pid) for pid in site.pids())


def test_nor_does_a_client_that_hangs_hold_anybody_up(daemon, plan, site, monkeypatch):
    monkeypatch.setattr(rootless_docker, "START_PATIENCE_S", 0.5)
    monkeypatch.setattr(rootless_docker, "ANSWER_PATIENCE_S", 0.2)
    site.has("docker", "exec sleep 300\n")
    began = time.monotonic()
    with pytest.raises(NodeError, match="does not answer"):
        daemon().start(plan)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "reason",
    [
        "failed to start daemon: error initializing graphdriver: driver not supported",
        "failed to start daemon: Devices cgroup isn't mounted",
        "Status: unknown flag: --nonsense",
        'time="2026-11-25T14:07:29Z" level=fatal msg="no room left"',
        "[rootlesskit:parent] error: failed to setup UID/GID map: newuidmap: Permission denied",
    ],
)
def test_one_that_dies_at_once_is_quoted(daemon, plan, site, reason, tmp_path):
    """Not rootlesskit, whose last word is only that its child has ended."""
    site.has("dockerd-rootless.sh", f"cat <<'END'\n{LAST_WORDS.format(reason=reason)}END\nexit 1\n")
    began = time.monotonic()
    with pytest.raises(NodeError) as caught:
        daemon().start(plan)
    first, second = str(caught.value).splitlines()
    assert first == f"rootless dockerd ended: {reason}"
    assert second == f"  all of it: {tmp_path}/dockerd-7.log"
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("output", "quoted"),
    [
        ("", "it said nothing"),
        ("XDG_RUNTIME_DIR needs to be set\n", "XDG_RUNTIME_DIR needs to be set"),
        ("[rootlesskit:parent] error: child exited: exit status 1\n", "[rootlesskit:parent] error: child exited: exit"),
    ],
)
def test_whatever_there_is_is_better_than_nothing(daemon, plan, site, output, quoted):
    site.has("dockerd-rootless.sh", f"printf '{output}'\nexit 1\n")
    with pytest.raises(NodeError) as caught:
        daemon().start(plan)
    assert f"rootless dockerd ended: {quoted}" in str(caught.value)


def test_a_daemon_of_root_is_refused(daemon, plan, site):
    site.has("docker", "echo '[name=seccomp,profile=default]'\n")
    docker = daemon()
    with pytest.raises(NodeError, match=r"docker\.sock is not rootless \(\[name=seccomp"):
        docker.start(plan)
    assert docker.stop()


@pytest.mark.parametrize("program", ["dockerd-rootless.sh", "docker"])
def test_a_node_without_docker_is_told_which_module_is_missing(daemon, plan, site, program, monkeypatch):
    (site.bin / program).unlink()
    monkeypatch.setenv("PATH", str(site.bin))
    docker = daemon()
    with pytest.raises(NodeError, match=rf"^{program} cannot be run on this node \(No such file.*modules"):
        docker.start(plan)
    assert docker.stop()


def test_two_at_once_take_different_data_roots_and_break_nothing_of_each_other(daemon, plan, site):
    first, second = daemon("7"), daemon("8")
    first.start(plan)
    pids = site.pids()
    second.start(plan)
    words = site.said("argv").split("\0")
    assert words[words.index("--data-root") + 1].endswith("/g2001/1")
    assert first.folder != second.folder
    assert second.stop()
    assert not any(is_gone(pid) for pid in pids)


def test_the_next_job_finds_the_images_of_the_last(daemon, plan, site):
    for job in ("7", "8"):
        docker = daemon(job)
        docker.start(plan)
        words = site.said("argv").split("\0")
        assert words[words.index("--data-root") + 1].endswith("/g2001/0")
        assert docker.stop()


def test_nodes_that_share_a_disk_do_not_share_a_data_root(daemon, plan, site):
    for name, index in (("g2001", 0), ("g2002", 1)):
        daemon("7", name, index).start(plan)
        assert f"/{name}/0\0" in site.said("argv")


def test_there_is_an_end_to_daemons_of_one_user(daemon, plan, monkeypatch):
    monkeypatch.setattr(rootless_docker, "MOST_DATA_ROOTS", 1)
    daemon("7").start(plan)
    refused = daemon("8")
    with pytest.raises(NodeError, match="1 daemons of yours run on this node already .*end some of them"):
        refused.start(plan)
    assert refused.stop()


def test_stopping_leaves_no_process_and_no_folder(daemon, plan, site):
    docker = daemon()
    docker.start(plan)
    assert docker.stop()
    assert all(is_gone(pid) for pid in site.pids())
    assert list(site.runtime.iterdir()) == []
    assert site.said("rootlesskit") == f"rm -rf {docker.folder}\n"


def test_nor_does_it_where_the_daemon_ignores_term(daemon, plan, site, monkeypatch):
    monkeypatch.setattr(rootless_docker, "STOP_PATIENCE_S", 0.3)
    site.has("dockerd-rootless.sh", DEAF)
    docker = daemon()
    docker.start(plan)
    pids = site.pids()
    assert docker.stop()
    wait_for(lambda: all(is_gone(pid) for pid in pids))
    assert list(site.runtime.iterdir()) == []


def test_a_folder_that_cannot_be_removed_is_not_called_clean(daemon, plan, site, monkeypatch):
    """Files of subordinate ids, where rootlesskit is missing."""
    docker = daemon()
    docker.start(plan)
    site.has("rootlesskit", "exit 1\n")
    monkeypatch.setattr(rootless_docker.shutil, "rmtree", lambda *path, **options: None)
    assert not docker.stop()


def test_what_never_started_is_stopped_at_once(daemon, site):
    assert daemon().stop()
    assert not (site.state / "rootlesskit").exists()


def test_what_an_earlier_start_left_in_its_folder_is_gone(daemon, plan, site):
    docker = daemon()
    docker.folder.mkdir()
    (docker.folder / "docker.sock").write_text("stale")
    docker.start(plan)
    assert (docker.folder / "docker.sock").read_text() == ""


def test_what_dead_jobs_left_is_swept_and_what_is_in_use_is_not(daemon, plan, site, tmp_path):
    """A folder that an agent left which was killed with its guard; Slurm knows job 18 alone."""
    site.has("squeue", 'case "$*" in *--jobs=18*) echo RUNNING ;; *) echo Invalid job id >&2; exit 1 ;; esac\n')
    data_root = tmp_path / "other-data"
    uid = os.getuid()
    names = (f"cpm-{uid}-5.1-0", f"cpm-{uid}-18.1-0", f"cpm-{uid}-6.1-3", f"cpm-{uid + 1}-5.1-0", "cpm-sandbox")
    dead, alive, held, of_another_user, of_nobody = (site.runtime / name for name in names)
    for folder in (dead, alive, held, of_another_user, of_nobody):
        folder.mkdir()
        (folder / "docker.pid").touch()
    (dead / "data-root").symlink_to(tmp_path / "gone/0")
    (held / "data-root").symlink_to(data_root)
    lock = rootless_docker._locked(data_root)

    docker = daemon()
    docker.start(plan)

    assert set(site.runtime.iterdir()) == {alive, held, of_another_user, of_nobody, docker.folder}
    lock.close()
    daemon("8").start(plan)
    assert not held.exists()


def test_a_folder_that_another_user_made_in_this_users_name_is_left_alone(daemon, plan, tmp_path, site, monkeypatch):
    """In /tmp anybody can; the lock of whatever its data root is said to be would be emptied when it is opened."""
    me = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: me)
    planted, file = site.runtime / f"cpm-{me}-5.1-0", tmp_path / "poetry.lock"
    planted.mkdir()
    file.write_text("mine")
    (planted / "data-root").symlink_to(tmp_path / "poetry")
    site.has("squeue", "echo Invalid job id >&2; exit 1\n")

    daemon().start(plan)

    assert file.read_text() == "mine" and planted.exists()


def test_its_processes_end_with_the_first_of_them(daemon, plan, site):
    """In a process namespace: Slurm's SIGKILL does not reach a container's own control group of version 1."""
    daemon().start(plan)
    environment = dict(line.partition("=")[::2] for line in site.said("environment").splitlines())
    assert "--pidns" in environment["DOCKERD_ROOTLESS_ROOTLESSKIT_FLAGS"].split()


def test_a_killed_daemon_is_revived_on_its_own_data_root(daemon, plan, site):
    """The first data root is free by then, and has not the container that is to be removed."""
    first, second = daemon(job="7"), daemon(job="8")
    first.start(plan)
    second.start(plan)
    killed = site.pids()
    first.stop()
    for pid in killed:
        os.kill(pid, 9)
    wait_for(lambda: all(map(is_gone, killed)))
    second.revive()
    words = site.said("argv").split("\0")
    assert words[words.index("--data-root") + 1] == f"{data_root_base(plan)}/g2001/1"
    assert site.pids() != killed
    assert second.stop()


def test_the_guard_revives_the_daemon_of_an_agent_that_was_killed(daemon, plan, site):
    of_agent, of_guard = daemon(), daemon()
    of_agent.start(plan)
    killed = site.pids()
    for pid in killed:
        os.kill(pid, 9)
    wait_for(lambda: all(map(is_gone, killed)))
    of_agent._lock.close()  # as the agent's end does
    of_guard.revive()
    assert site.pids() != killed
    assert of_guard.stop()
    assert not of_guard.folder.exists()


def test_a_data_root_is_taken_while_a_daemon_lives_whose_agent_was_killed(daemon, plan, site):
    """Two daemons on one data root: the second would find its database locked."""
    of_killed_agent, other = daemon(job="7"), daemon(job="8")
    of_killed_agent.start(plan)
    pids = site.pids()
    of_killed_agent._lock.close()  # as the agent's end does
    other.start(plan)
    words = site.said("argv").split("\0")
    assert words[words.index("--data-root") + 1] == f"{data_root_base(plan)}/g2001/1"
    for pid in pids:
        os.kill(pid, 9)


def test_a_daemon_that_lives_or_never_started_is_not_revived(daemon, plan, site):
    docker = daemon()
    docker.revive()
    assert site.pids() == []
    docker.start(plan)
    pids = site.pids()
    docker.revive()
    assert site.pids() == pids


def test_a_daemon_that_ended_is_named(daemon, plan, site, monkeypatch):
    monkeypatch.setattr(rootless_docker, "ENDING_PATIENCE_S", 0.1)
    docker = daemon()
    docker.start(plan)
    docker.require_running()
    for pid in site.pids():
        os.kill(pid, 9)
    with pytest.raises(NodeError, match="its Docker daemon ended while the container ran") as raised:
        docker.require_running()
    assert raised.value.blamed == ("g2001",)
