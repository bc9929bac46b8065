"""Checkpoints as one rank sees them: an engine that saves a line of text, threads, files, and what is found again."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
from torch_here import needs_torch_engine

from cpm_cluster.training import checkpoint
from cpm_cluster.training.checkpoint import START, CheckpointError, Checkpoints, Progressed, damage_of
from cpm_cluster.training.engines.sharded_state import read_index
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import naming


class LineEngine:
    """An engine of one rank whose whole state is a line; its disk waits for ``disk``, or fails with ``failure``."""

    def __init__(self, line: str = "") -> None:
        self.line = line
        self.disk = threading.Event()
        self.disk.set()
        self.failure: OSError | None = None

    def stage_state(self, directory):
        return LineStaged(self, directory)

    def load_state(self, directory) -> None:
        self.line = (directory / "line").read_text()

    def all_gather_text(self, text: str) -> list[str]:
        return [text]

    def any_flag(self, flag: bool) -> bool:
        return flag


class LineStaged:
    live = False

    def __init__(self, engine: LineEngine, directory) -> None:
        self.engine, self.line, self.directory = engine, engine.line, directory

    def write(self):
        assert self.engine.disk.wait(10)
        if self.engine.failure is not None:
            raise self.engine.failure
        (self.directory / "line").write_text(self.line)
        return [self.directory / "line"]

    def gather_index(self):
        def write_index():
            (self.directory / "index").write_text("line")
            return [self.directory / "index"]

        return write_index


@pytest.fixture
def make(tiny_settings, tmp_path):
    """Return what a new attempt has: ``make(keep=2)``."""

    def make(keep: int = 2, asynchronous: bool = True, **changes: object) -> Checkpoints:
        changes = {"output_dir": str(tmp_path), "expected_world_size": 1, **changes}
        about = {"training.checkpoint": {"every": 1, "keep": keep, "asynchronous": asynchronous}}
        return Checkpoints(tiny_settings(**changes, **about), 0)

    return make


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


def saved(checkpoints: Checkpoints, engine: LineEngine, *steps: int) -> None:
    for step in steps:
        engine.line = f"after {step}"
        checkpoints.save(engine, Progressed(step, 10 * step, {"row": step}, {"losses": [1.5]}))
    checkpoints.finish()


def names(root) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_training_goes_on_while_the_disk_writes_what_was_staged(make, root):
    engine, checkpoints = LineEngine("before"), make()
    engine.disk.clear()

    checkpoints.save(engine, Progressed(1, 10))
    engine.line = "two steps later"
    checkpoints.poll()
    assert checkpoints.newest_step is None and not (root / "latest").exists()

    engine.disk.set()
    deadline = time.monotonic() + 10
    while checkpoints.newest_step is None and time.monotonic() < deadline:
        checkpoints.poll()
    assert (checkpoints.newest_step, names(root)) == (1, ["latest", "step-00000001"])
    assert (root / "step-00000001/line").read_text() == "before"


def test_a_synchronous_save_is_published_when_it_returns(make, root):
    checkpoints = make(asynchronous=False)

    checkpoints.save(LineEngine("now"), Progressed(1, 10))

    assert (checkpoints.newest_step, names(root)) == (1, ["latest", "step-00000001"])


def test_what_was_saved_is_what_is_resumed(make, root):
    saved(make(), LineEngine(), 1, 2, 3)

    engine, checkpoints = LineEngine(), make()
    progressed = checkpoints.resume(engine)

    assert progressed == Progressed(3, 30, {"row": 3}, {"losses": [1.5]})
    assert (engine.line, checkpoints.newest_step) == ("after 3", 3)
    assert names(root) == ["latest", "step-00000002", "step-00000003"]
    assert (root / "latest").read_text() == "step-00000003\n"
    manifest = json.loads((root / "step-00000003/manifest.json").read_text())
    assert sorted(manifest["files"]) == ["index", "line", "position.json"]
    assert (manifest["step"], manifest["world_size"]) == (3, 1)


def test_a_step_is_saved_once(make, root):
    engine, checkpoints = LineEngine("once"), make()
    engine.disk.clear()
    checkpoints.save(engine, Progressed(1, 10))
    engine.line = "twice"

    checkpoints.save(engine, Progressed(1, 10))
    engine.disk.set()
    saved(checkpoints, engine, 1)

    assert checkpoints.newest_step == 1 and (root / "step-00000001/line").read_text() == "once"


def damage_altered(directory) -> str:
    text = (directory / "line").read_text()
    (directory / "line").write_text(text[:-1] + "x")
    return "line is not what was written"


def damage_shortened(directory) -> str:
    os.truncate(directory / "line", 3)
    return "line is not what was written"


def damage_missing(directory) -> str:
    (directory / "index").unlink()
    return "index is missing"


def damage_no_manifest(directory) -> str:
    (directory / "manifest.json").unlink()
    return "its manifest is missing or broken"


def damage_torn_manifest(directory) -> str:
    os.truncate(directory / "manifest.json", 40)
    return "its manifest is missing or broken"


@pytest.mark.parametrize(
    "damage", [damage_altered, damage_shortened, damage_missing, damage_no_manifest, damage_torn_manifest]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(make, root, capsys, damage):
    saved(make(), LineEngine(), 1, 2)
    reason = damage(root / "step-00000002")

    engine, checkpoints = LineEngine(), make()
    assert checkpoints.resume(engine).step == 1

    assert engine.line == "after 1"
    assert capsys.readouterr().err == f"checkpoint step-00000002 is not used: {reason}\n"
    assert (root / "latest").read_text() == "step-00000001\n"
    saved(checkpoints, engine, 2)
    assert damage_of(root / "step-00000002") is None and names(root) == ["latest", "step-00000001", "step-00000002"]


def test_without_a_whole_checkpoint_a_run_begins_at_the_start(make, root):
    saved(make(), LineEngine(), 1)
    damage_missing(root / "step-00000001")

    assert make().resume(LineEngine()) == START


def test_every_file_is_somebody_s_to_check(make, root):
    saved(make(), LineEngine(), 1)
    whole = root / "step-00000001"
    assert [damage_of(whole, rank, 2) for rank in range(2)] == [None, None]

    for name in ("index", "line", "position.json"):
        torn = root / f"torn-{name}"
        shutil.copytree(whole, torn)
        os.truncate(torn / name, 1)
        found = [damage_of(torn, rank, 2) for rank in range(2)]
        assert sorted(found, key=str) == [None, f"{name} is not what was written"]


def test_a_full_disk_ends_the_run_with_the_file_s_name_and_leaves_the_earlier_checkpoint(make, root):
    engine, checkpoints = LineEngine(), make()
    saved(checkpoints, engine, 1)
    engine.failure = OSError(errno.ENOSPC, "No space left on device", "/disk/line")

    checkpoints.save(engine, Progressed(2, 20))
    with pytest.raises(CheckpointError, match=r"rank 0: \[Errno 28\] No space left on device: '/disk/line'"):
        checkpoints.finish()

    assert names(root) == ["latest", "step-00000001"] and damage_of(root / "step-00000001") is None
    assert make().resume(LineEngine()).step == 1


def test_a_save_that_will_not_fit_is_not_begun(make, root, monkeypatch):
    engine, checkpoints = LineEngine(), make()
    saved(checkpoints, engine, 1)
    free = sum(path.stat().st_size for path in (root / "step-00000001").glob("[!m]*")) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    with pytest.raises(CheckpointError, match="no space left on device: .* 0 MiB free, and the last checkpoint took"):
        saved(checkpoints, engine, 2)

    assert names(root) == ["latest", "step-00000001"]


def test_a_failure_while_publishing_is_an_error_too(make, root, monkeypatch):
    engine, checkpoints = LineEngine(), make()
    saved(checkpoints, engine, 1)

    def fail(path, value) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded", str(path))

    monkeypatch.setattr(checkpoint, "write_json", fail)
    with pytest.raises(CheckpointError, match=r"Disk quota exceeded: '.*position.json'"):
        saved(checkpoints, engine, 2)

    assert names(root) == ["latest", "step-00000001"]


def test_what_a_killed_attempt_was_writing_or_removing_is_swept_away(make, root):
    saved(make(), LineEngine(), 1)
    for leftover in (".step-00000002.partial", ".step-00000000.removed"):
        (root / leftover).mkdir()
        (root / leftover / "line").write_text("half")
    (root / ".latest.17.tmp").write_text("step-")

    assert make().resume(LineEngine()).step == 1

    assert names(root) == ["latest", "step-00000001"]


def test_files_that_somebody_still_reads_end_no_run_and_go_with_the_next_attempt(make, root, monkeypatch):
    checkpoints, engine = make(keep=1), LineEngine()
    saved(checkpoints, engine, 1)
    with monkeypatch.context() as nfs:
        nfs.setattr(os, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EBUSY, "busy")))
        saved(checkpoints, engine, 2)
        assert make().resume(engine).step == 2
    assert names(root) == [".step-00000001.removed", "latest", "step-00000002"]

    assert make().resume(engine).step == 2
    assert names(root) == ["latest", "step-00000002"]


def test_a_run_that_returns_to_a_checkpoint_waits_for_the_save_in_flight(make):
    engine, checkpoints = LineEngine("good"), make()
    checkpoints.save(engine, Progressed(4, 40))
    engine.line = "diverged"

    assert checkpoints.resume(engine).step == 4

    assert engine.line == "good"


@pytest.mark.parametrize(("change", "value"), [("engine", "other"), ("model.ffn", 64)])
def test_a_checkpoint_of_something_else_is_refused(make, change, value):
    saved(make(), LineEngine(), 1)

    with pytest.raises(UserError, match=f"written with another {change.split('.')[0]}; use a new output_dir"):
        make(**{change: value}).resume(LineEngine())


class Attack:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_index_of_a_checkpoint_runs_no_code(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "made")))

    with pytest.raises(UserError, match=r"posix.mkdir has no place in an index of tensors"):
        read_index(tmp_path)

    assert not (tmp_path / "made").exists()


class Attribute:
    """Pickled as Python 3.11.2, that of Debian 12, does it with a member of an enumeration."""

    def __init__(self, owner, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


@needs_torch_engine
def test_of_what_an_index_names_members_of_enumerations_alone_are_looked_up(tmp_path):
    from torch.distributed.checkpoint import metadata

    layouts = metadata._MEM_FORMAT_ENCODING
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attribute(layouts, "TORCH_CHANNELS_LAST")))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.metadata").write_bytes(pickle.dumps(Attribute(metadata.Metadata, "__init__")))

    assert read_index(tmp_path) is layouts.TORCH_CHANNELS_LAST
    with pytest.raises(UserError, match="an attribute __init__ has no place in an index of tensors"):
        read_index(tmp_path / "other")


def test_an_error_of_writing_gets_the_name_of_its_file_even_through_another_error(tmp_path):
    found = pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*/weights'")
    with found, naming(tmp_path / "weights"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
