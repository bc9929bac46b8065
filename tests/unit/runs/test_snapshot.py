"""The copy of the user's code: what is in it, what stays out, and when it is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cpm_cluster.runs import snapshot
from cpm_cluster.runs.snapshot import SnapshotError, copy_package, default_source, take_snapshot

GIT = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
A_RUN = "job-20260102-030405-00ff"


def git(folder, *words):
    return subprocess.run([*GIT, "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}\n")


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.fixture
def checkout(source):
    write(source, "kept.py", "deleted.py", "sub/kept.py", ".env.example")
    (source / ".gitignore").write_text("*.pt\ndata/\n")
    git(source, "init")
    git(source, "add", "--all")
    git(source, "commit", "--message", "start")
    return source


def copied(source, tmp_path):
    taken = take_snapshot(source, tmp_path / "code")
    assert taken.files == len(names_in(tmp_path / "code"))
    return taken, names_in(tmp_path / "code")


def test_a_checkout_as_it_is_now(checkout, tmp_path):
    (checkout / "deleted.py").unlink()
    (checkout / "kept.py").write_text("changed\n")
    write(checkout, "untracked.py", "model.pt", "data/rows.jsonl", "with space.py", "neu-ä\n.py")
    taken, names = copied(checkout, tmp_path)
    assert names == {
        ".gitignore",
        ".env.example",
        "kept.py",
        "sub/kept.py",
        "untracked.py",
        "with space.py",
        "neu-ä\n.py",
    }
    assert (tmp_path / "code/kept.py").read_text() == "changed\n"
    assert taken.commit == git(checkout, "rev-parse", "HEAD").strip() and taken.changed


def test_a_checkout_without_changes(checkout, tmp_path):
    taken, _ = copied(checkout, tmp_path)
    assert not taken.changed
    assert taken.bytes == sum(path.stat().st_size for path in (tmp_path / "code").rglob("*") if path.is_file())


def test_a_checkout_without_a_commit(source, tmp_path):
    write(source, "new.py")
    git(source, "init")
    taken, names = copied(source, tmp_path)
    assert (names, taken.commit, taken.changed) == ({"new.py"}, None, True)


def test_a_folder_inside_a_checkout(checkout, tmp_path):
    _, names = copied(checkout / "sub", tmp_path)
    assert names == {"kept.py"}


def test_a_folder_that_the_checkout_around_it_ignores(checkout, tmp_path):
    write(checkout, "data/train.py")
    _, names = copied(checkout / "data", tmp_path)
    assert names == {"train.py"}


def test_a_submodule_and_a_checkout_inside_come_with_their_files(checkout, tmp_path):
    other = tmp_path / "other"
    write(other, "library.py", "weights.pt")
    (other / ".gitignore").write_text("*.pt\n")
    git(other, "init")
    git(other, "add", "--all")
    git(other, "commit", "--message", "start")
    git(checkout, "-c", "protocol.file.allow=always", "submodule", "add", str(other), "module")
    git(checkout, "clone", str(other), "inside")
    write(checkout, "module/new.py", "module/big.pt")
    _, names = copied(checkout, tmp_path)
    assert {"module/library.py", "module/new.py", "inside/library.py", "kept.py"} <= names
    assert not [name for name in names if name.endswith(".pt") or ".git/" in name]


def test_a_submodule_that_was_never_fetched_is_an_empty_folder(checkout, tmp_path):
    head = git(checkout, "rev-parse", "HEAD").strip()
    git(checkout, "update-index", "--add", "--cacheinfo", f"160000,{head},module")
    (checkout / "module").mkdir()
    _, names = copied(checkout, tmp_path)
    assert "kept.py" in names and not [name for name in names if name.startswith("module")]


def test_a_folder_without_git_is_copied_without_hidden_files_and_environments(source, tmp_path):
    write(source, "train.py", "lib/model.py", ".ssh/id_rsa", ".config/cpm-cluster/secrets.env", ".env", "lib/.key")
    write(source, "venv/bin/python", "__pycache__/train.pyc", "lib/__pycache__/model.pyc", "node_modules/x.js")
    taken, names = copied(source, tmp_path)
    assert names == {"train.py", "lib/model.py"}
    assert (taken.commit, taken.changed) == (None, False)


@pytest.mark.parametrize("kind", ["checkout", "source"])
def test_runs_do_not_hold_each_other(kind, request, tmp_path):
    source = request.getfixturevalue(kind)
    write(source, "train.py", f"runs/{A_RUN}/weights/model", f"{A_RUN}/launch.json", f".{A_RUN}.partial/code/train.py")
    _, names = copied(source, tmp_path)
    assert "train.py" in names and not [name for name in names if A_RUN in name]


def test_links_are_copied_as_links(source, tmp_path):
    write(source, "folder/file.py")
    (source / "to-file").symlink_to("folder/file.py")
    (source / "to-folder").symlink_to("folder")
    (source / "to-itself").symlink_to(source)
    (source / "dangling").symlink_to("/nowhere")
    os.mkfifo(source / "pipe")
    _, names = copied(source, tmp_path)
    assert names == {"folder/file.py", "to-file", "to-folder", "to-itself", "dangling"}
    assert os.readlink(tmp_path / "code/to-folder") == "folder"


def test_a_script_stays_executable(source, tmp_path):
    write(source, "run.sh")
    (source / "run.sh").chmod(0o755)
    copied(source, tmp_path)
    assert os.access(tmp_path / "code/run.sh", os.X_OK)


def test_a_folder_that_is_too_large_is_refused_before_it_is_copied(source, tmp_path):
    with (source / "weights.bin").open("wb") as file:
        file.truncate(snapshot.MAX_BYTES + 1)
    with pytest.raises(
        SnapshotError, match=r"larger than 200 MiB .*`code:` in the job file, or list data .*\.gitignore"
    ):
        take_snapshot(source, tmp_path / "code")
    assert not (tmp_path / "code/weights.bin").exists()


def test_a_folder_with_too_many_files_is_refused_without_looking_at_all(source, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "MAX_FILES", 10)
    walked = []

    def endless(top):
        for number in range(10**9):
            walked.append(number)
            write(source, f"{number}.py")
            yield str(source), [], [f"{number}.py"]

    monkeypatch.setattr(os, "walk", endless)
    with pytest.raises(SnapshotError):
        take_snapshot(source, tmp_path / "code")
    assert len(walked) == 11


def test_what_is_copied_by_default(checkout, tmp_path):
    write(tmp_path / "alone", "job.yaml")
    assert default_source(checkout / "sub" / "job.yaml") == checkout.resolve()
    assert default_source(tmp_path / "alone" / "job.yaml") == tmp_path / "alone"


def test_a_runs_own_job_file_brings_the_code_of_that_run(checkout):
    write(checkout, f"runs/{A_RUN}/launch.json", f"runs/{A_RUN}/code/old.py")
    assert default_source(checkout / "runs" / A_RUN / "job.yaml") == checkout / "runs" / A_RUN / "code"


def test_the_agents_copy_needs_nothing_but_the_standard_library(tmp_path):
    copy_package(tmp_path / "package")
    isolated = [sys.executable, "-I", "-S", str(tmp_path / "package")]
    done = subprocess.run(isolated, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        ["usage: python PACKAGE RUN_DIR [begin | end CODE | clean]"],
    )
