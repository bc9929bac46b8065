"""The image is there before the run, the container is gone after it. Docker is a stand-in that notes its calls."""

from __future__ import annotations

import hashlib
import json

import pytest
from made_runs import container

from cpm_cluster.agent.containers import check_archive, ensure_image, remove, sweep_orphans
from cpm_cluster.agent.surroundings import NodeError, node_facts
from cpm_cluster.launch.plan import Archive, NodeFacts
from cpm_cluster.runs.records import read_events


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "image.tar"
    path.write_bytes(b"an image")
    return Archive(str(path), 8, hashlib.sha256(b"an image").hexdigest())


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """`docker(present=False)`: installs the stand-in, in which an image is present once it is loaded; its calls."""
    folder = tmp_path / "docker"
    folder.mkdir()

    def install(present=False, loads="yes"):
        (folder / "docker").write_text(f"""#!/bin/sh
echo "$@" >> {folder}/calls
case "$1 $2" in
    "image inspect") test -e {folder}/present ;;
    "load "*) case {loads} in yes) touch {folder}/present ;; other) ;; no) echo broken >&2; exit 1 ;; esac ;;
    "inspect "*) echo '[{{"State": {{"ExitCode": 3, "OOMKilled": true}}}}]' ;;
esac
""")
        (folder / "docker").chmod(0o755)
        if present:
            (folder / "present").touch()
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return lambda: (folder / "calls").read_text().splitlines()

    return install


@pytest.fixture
def plan_with(made_run):
    def plan(archive):
        return made_run(trainer=False, runtime="docker", container=container(image="image:1", archive=archive)).run

    return plan


def test_an_image_that_is_there_is_not_loaded_again(docker, plan_with, archive):
    calls = docker(present=True)
    ensure_image(plan_with(archive).plan)
    assert calls() and not [call for call in calls() if call.startswith("load")]


def test_a_missing_image_is_loaded_from_its_archive(docker, plan_with, archive):
    calls = docker()
    ensure_image(plan_with(archive).plan)
    assert f"load --input {archive.path}" in calls()


def test_an_image_that_cannot_be_had(docker, plan_with, archive):
    docker()
    with pytest.raises(NodeError, match="image:1 is not on this node, and there is no archive.*image_folder"):
        ensure_image(plan_with(None).plan)
    docker(loads="no")
    with pytest.raises(NodeError, match="docker load --input .*image.tar failed"):
        ensure_image(plan_with(archive).plan)
    docker(loads="other")
    with pytest.raises(NodeError, match="image.tar holds another image than image:1"):
        ensure_image(plan_with(archive).plan)


def test_a_node_without_docker(plan_with, archive, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NodeError, match="docker cannot be run on this node: No such file"):
        ensure_image(plan_with(archive).plan)


def test_a_broken_archive_is_named_before_docker_sees_it(archive, tmp_path):
    check_archive(archive)
    check_archive(Archive(archive.path, None, None))
    with pytest.raises(NodeError, match="has 8 bytes instead of 1,000: download it again"):
        check_archive(Archive(archive.path, 1000, None))
    with pytest.raises(NodeError, match="has another SHA-256 than published"):
        check_archive(Archive(archive.path, 8, "0" * 64))
    with pytest.raises(NodeError, match="is not there; download it, or mend image_folder"):
        check_archive(Archive(str(tmp_path / "absent.tar"), None, None))


def test_a_container_is_recorded_and_removed(docker, plan_with, archive):
    calls, run = docker(), plan_with(archive)
    node = node_facts(run.files, {})
    events = run.files.events("n1")
    remove(run.plan, node, events)
    (run.files.root / "attempt-1/node-0/container.id").write_text("c0ffee\n")
    remove(run.plan, node, events)
    remove(run.plan, node, events)
    removed = [call.split() for call in calls() if call.startswith("rm ")]
    assert [(words[1], words[-1]) for words in removed] == [("--force", "c0ffee")]
    (event,) = read_events(run.files.root / "events")
    assert (event["id"], event["state"]["OOMKilled"]) == ("c0ffee", True), json.dumps(event)


LEFT_BEHIND = {
    "of-a-dead-job": {"cpm.job": "17", "cpm.node": "g2001", "cpm.attempt": "1"},
    "of-a-live-job": {"cpm.job": "18", "cpm.node": "g2001", "cpm.attempt": "1"},
    "of-another-node": {"cpm.job": "17", "cpm.node": "g2002", "cpm.attempt": "1"},
    "of-an-earlier-attempt": {"cpm.job": "20", "cpm.node": "g2001", "cpm.attempt": "2"},
    "of-this-attempt": {"cpm.job": "20", "cpm.node": "g2001", "cpm.attempt": "3"},
    "without-labels": None,
}


@pytest.fixture
def node_with_containers(tmp_path, monkeypatch):
    """A stand-in of docker and podman with containers, and a squeue that knows job 18; their calls."""
    labels = {name: json.dumps([{"Config": {"Labels": found}}]) for name, found in LEFT_BEHIND.items()}
    inspected = "\n".join(f"    'inspect {name}') echo '{text}' ;;" for name, text in labels.items())
    listed = " ".join(LEFT_BEHIND)
    program = f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in\n    ps*) echo {listed} ;;\n{inspected}\nesac\n'
    squeue = '#!/bin/sh\ncase "$*" in *--jobs=18*) echo RUNNING ;; *) echo Invalid job id >&2; exit 1 ;; esac\n'
    for name, text in (("docker", program), ("podman", program), ("squeue", squeue)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return lambda: (tmp_path / "calls").read_text().splitlines()


def swept(made_run, runtime, tmp_path):
    """Names of the containers whose removal is recorded as an event."""
    plan = made_run(runtime=runtime, container=container()).run.plan
    node = NodeFacts("g2001", 0, "20", 3, "127.0.0.1", "61000", (), "", "")
    sweep_orphans(plan, node, tmp_path / "events" / "g2001.jsonl")
    return {event["id"] for event in read_events(tmp_path / "events") if event["kind"] == "orphan"}


@pytest.mark.parametrize("runtime", ["docker", "podman"])
def test_what_dead_jobs_and_earlier_attempts_left_on_the_node_is_swept(
    node_with_containers, made_run, tmp_path, runtime
):
    found = swept(made_run, runtime, tmp_path)
    assert found == {"of-a-dead-job", "of-an-earlier-attempt"}
    for name in found:
        calls = [call for call in node_with_containers() if call.endswith(f" {name}")]
        assert calls[-2:] == [f"kill {name}", f"rm --force --volumes {name}"]


def test_a_rootless_daemon_sweeps_all_that_is_in_its_data_root(node_with_containers, made_run, tmp_path):
    assert swept(made_run, "docker-rootless", tmp_path) == set(LEFT_BEHIND)
