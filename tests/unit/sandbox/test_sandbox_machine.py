"""What the sandbox does to the machine, in small: names, processes, folders, and what it says where it cannot."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpm_cluster.cli import exit_codes
from cpm_cluster.cli.main import main
from cpm_cluster.sandbox import folders, mounts, network, processes, requirements
from cpm_cluster.sandbox.commands import run, wait_for
from cpm_cluster.sandbox.processes import ProcessFile
from cpm_cluster.sandbox.state import Sandbox, SandboxError

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
)


@pytest.mark.parametrize("text", ["127.0.0.1 localhost\n", "127.0.0.1 localhost", "", "\n\n# mine\n10.0.0.1 g2001\n"])
def test_the_hosts_file_is_restored_to_the_byte(tmp_path: Path, text: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(text)
    hosts.chmod(0o755)
    for _ in range(2):
        network.write_names(Sandbox(), hosts)
    lines = hosts.read_text().splitlines()
    assert [line for line in lines if "10.77" in line][1] == "10.77.0.1 g2001", "after that of the head"
    assert sum("g2001" in line for line in lines if "10.77" in line) == 1
    network.remove_names(hosts)
    assert hosts.read_text() == text
    assert hosts.stat().st_mode & 0o777 == 0o755


def test_what_others_add_to_the_hosts_file_meanwhile_stays(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    network.write_names(Sandbox(), hosts)
    hosts.write_text("10.1.1.1 above\n" + hosts.read_text() + "10.1.1.2 below\n")
    network.remove_names(hosts)
    assert hosts.read_text() == "10.1.1.1 above\n127.0.0.1 localhost\n10.1.1.2 below\n"


@pytest.fixture
def stubborn(tmp_path: Path) -> tuple[subprocess.Popen[bytes], ProcessFile]:
    """A process that ignores SIGTERM, started as a daemon is."""
    file = ProcessFile(tmp_path / "daemon.pid")
    log = tmp_path / "log"
    process = processes.start([sys.executable, "-c", STUBBORN], {"PATH": "/bin"}, log, file)
    assert wait_for(lambda: log.read_text() == "ready\n", 20)
    return process, file


def test_a_daemon_is_found_again_and_ended(stubborn: tuple[subprocess.Popen[bytes], ProcessFile]) -> None:
    process, file = stubborn
    assert file.pid == process.pid
    file.end(patience_s=0.2)
    assert process.wait(10) == -signal.SIGKILL
    assert file.pid is None
    assert not file.path.exists()


def test_a_daemon_has_nothing_of_the_callers_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    script = "import os; print(sorted(os.environ), os.getcwd(), os.getsid(0) == os.getpid())"
    log = tmp_path / "log"
    argv = [sys.executable, "-I", "-c", script]
    processes.start(argv, {"PATH": "/bin", "LC_ALL": "C"}, log, ProcessFile(tmp_path / "pid")).wait(20)
    assert log.read_text() == "['LC_ALL', 'PATH'] / True\n"


@pytest.mark.parametrize("field", [1, 2], ids=["start time", "boot"])
def test_a_process_that_only_has_the_same_number_is_left_alone(
    stubborn: tuple[subprocess.Popen[bytes], ProcessFile], field: int
) -> None:
    process, file = stubborn
    words = file.path.read_text().split()
    words[field] = "1"
    file.path.write_text(" ".join(words))
    assert file.pid is None
    file.end(patience_s=0.1)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_processes_of_a_network_namespace_are_found() -> None:
    own = Path("/proc/self/ns/net")
    assert os.getpid() in processes.in_namespaces([own])
    assert processes.in_namespaces([Path("/proc/self/ns/uts"), Path("/nowhere")]) == set()


def test_all_that_can_be_found_are_ended(stubborn: tuple[subprocess.Popen[bytes], ProcessFile]) -> None:
    process, file = stubborn

    def find() -> set[int]:
        return {process.pid} if file.pid else set()

    assert processes.end_all(find, patience_s=0.2) == set()
    assert process.wait(10) == -signal.SIGKILL


def test_a_command_that_fails_says_what_and_why() -> None:
    with pytest.raises(SandboxError, match=r"^sh -c echo no luck >&2; exit 4 ended with code 4: no luck$"):
        run(["sh", "-c", "echo no luck >&2; exit 4"])
    with pytest.raises(SandboxError, match=r"^no-such-program cannot be run: No such file or directory$"):
        run(["no-such-program"])
    with pytest.raises(SandboxError, match=r"^sleep 9 does not return within 0 s$"):
        run(["sleep", "9"], patience_s=0.1)


def test_waiting_ends_in_time() -> None:
    started = time.monotonic()
    assert wait_for(lambda: False, 0.3) is False
    assert time.monotonic() - started < 5
    assert wait_for(lambda: True, 0) is True


def test_a_folder_mounted_on_itself_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (
        "21 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "22 21 254:0 /run/netns /run/netns rw shared:1 - ext4 /dev/vda rw\n"
        "23 21 0:4 net:[1] /opt/a\\040b/uts rw - nsfs nsfs rw\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda path: table)
    assert mounts.mount_points() == [Path("/"), Path("/run/netns"), Path("/opt/a b/uts")]
    assert mounts.below(Path("/opt/a b")) == [Path("/opt/a b/uts")]
    assert mounts.below(Path("/run/netns")) == []


def test_only_a_new_an_empty_or_an_own_folder_is_taken(tmp_path: Path) -> None:
    new, empty, other = (Sandbox(root=Path("/tmp") / f"cpm-{os.getpid()}-{name}") for name in ("new", "empty", "other"))
    empty.root.mkdir()
    other.root.mkdir()
    (other.root / "thesis.tex").touch()
    try:
        for state in (new, empty, new):
            folders.make_root(state)
            assert folders.is_ours(state)
        with pytest.raises(SandboxError, match="is there already, and is no sandbox"):
            folders.make_root(other)
        (new.root / "run").mkdir()
        folders.remove_root(new)
        assert not new.root.exists()
    finally:
        subprocess.run(["rm", "-rf", str(empty.root), str(other.root)], check=True)


@pytest.mark.parametrize("root", ["sandbox", "/var/lib/" + "long" * 10])
def test_a_folder_that_sockets_cannot_be_in_is_refused(root: str) -> None:
    with pytest.raises(SandboxError, match="must be an absolute path of at most 40 bytes"):
        folders.make_root(Sandbox(root=Path(root)))


def test_one_up_or_down_at_a_time(tmp_path: Path) -> None:
    state = Sandbox(root=tmp_path)
    with folders.held(state), pytest.raises(SandboxError, match="another cpm sandbox works on"), folders.held(state):
        pass
    with folders.held(state):
        pass  # and it is free again


@pytest.mark.parametrize("verb", ["up", "down"])
def test_without_root_it_says_so_in_one_sentence(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit) as ended:
        main(["sandbox", verb])
    assert ended.value.code == exit_codes.UNAVAILABLE
    assert capsys.readouterr().err.startswith("error: the sandbox needs root: sudo ")


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(SandboxError, match="needs Linux, and this is Darwin"):
        requirements.require_root()


def test_missing_packages_are_named_with_the_way_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"sh": "dash", "no-such-program": "slurmdbd", "nor-this": "munge", "nor-that": "munge"}
    assert requirements.missing_packages(packages) == ["munge", "slurmdbd"]
    monkeypatch.setattr(requirements.shutil, "which", lambda name, path=None: "/bin/x" if name == "apt-get" else None)
    with pytest.raises(SandboxError, match="^packages are missing: dash munge slurmdbd; cpm sandbox up --install"):
        requirements.require_packages(packages, install=False)


def test_status_of_nothing_is_told_without_waiting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        main(["sandbox", "status", "--root", str(tmp_path)])
    assert ended.value.code == exit_codes.UNAVAILABLE
    assert "slurmctld          down" in capsys.readouterr().out
    assert time.monotonic() - started < 5
