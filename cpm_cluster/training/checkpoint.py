"""Checkpoints: written aside while training goes on, summed, renamed; found again newest first, and only when whole.

``checkpoints/step-00000100/`` holds the engine's files, ``position.json`` and ``manifest.json`` (step, world size, and
each file's size and SHA-256). ``checkpoints/latest`` names the newest directory. What is being written, and what is
being removed, has a name that begins with a dot.

A save is staged on the CPU by all ranks between two steps; then each rank writes its files and sums them in a thread.
Between later steps the ranks ask each other whether all are done: then rank 0 gathers the sums and publishes, in its
thread. One save is in flight at a time. The threads never talk to other ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Generator, List, Mapping, Sequence

from cpm_cluster.training.engines import Engine, StagedState
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import sha256_of, sync_directory, write_json, write_text
from cpm_cluster.training.settings import Settings

_MANIFEST, _POSITION, _FORMAT = "manifest.json", "position.json", 2
# How long a rank waits for its own thread before it shows the others that it is alive; far below their patience.
_SECONDS_BETWEEN_SIGNS = 1.0

Sums = Dict[str, Dict[str, object]]
_Saving = Generator["Future[Sums]", None, List[Sums]]


class CheckpointError(Exception):
    """A checkpoint could not be written; the message names the ranks, the files and the reasons."""


@dataclass(frozen=True)
class Progressed:
    """How far a run has come.

    Finished steps, tokens seen by all ranks, the data stream's position (a JSON object of its own), and what the loss
    guard remembers.
    """

    step: int
    tokens_seen: int
    position: Mapping[str, Any] = field(default_factory=dict)
    guard: Mapping[str, Any] = field(default_factory=dict)


START = Progressed(step=0, tokens_seen=0)


class Checkpoints:
    """The checkpoints of one run; rank 0 handles the directories, the engine's ranks write into them.

    All methods are collective. ``newest_step`` is that of the newest published checkpoint, None without one.
    """

    def __init__(self, settings: Settings, rank: int) -> None:
        self._root = Path(settings.output_dir) / "checkpoints"
        self._keep = settings.training.checkpoint.keep
        self._asynchronous = settings.training.checkpoint.asynchronous
        self._world_size = settings.expected_world_size
        self._trains = {
            "format": _FORMAT,
            "engine": settings.engine,
            "model": asdict(settings.model),
            "method": asdict(settings.method),
        }
        self._rank = rank
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: _Saving | None = None
        self._begun_step: int | None = None
        self.newest_step: int | None = None

    def save(self, engine: Engine, progressed: Progressed) -> None:
        """Begin a checkpoint of this step, unless that was done; the previous one is finished first.

        Returns when the state is staged; where that is no copy, or saves are not asynchronous, when it is published.
        Raises CheckpointError, on all ranks, as do :meth:`poll` and :meth:`finish`.
        """
        if self._begun_step == progressed.step:
            return
        self.finish()
        self._require_room(engine)
        staged = engine.stage_state(_partial(self._root, progressed.step))
        self._in_flight = self._save(engine, staged, progressed)
        next(self._in_flight)
        self._begun_step = progressed.step
        if staged.live or not self._asynchronous:
            self.finish()

    def poll(self) -> None:
        """Between two steps: take the save in flight further if all ranks are ready for that. Short."""
        if self._in_flight is not None and next(self._in_flight, None) is None:
            self._in_flight = None

    def finish(self) -> None:
        """Wait until no save is in flight."""
        for future in self._in_flight or ():
            wait([future], _SECONDS_BETWEEN_SIGNS)
        self._in_flight = None

    def resume(self, engine: Engine) -> Progressed:
        """Load the newest whole checkpoint into the engine and return how far it had come; START without one.

        Raises UserError when the checkpoint is of another model, method, engine or format.
        """
        self.finish()
        step = self._newest_whole(engine)
        if step is None:
            return START
        directory = _directory(self._root, step)
        state: dict[str, Any] = json.loads((directory / _POSITION).read_text(encoding="utf-8"))
        for key in self._trains:
            if state.pop(key, None) != json.loads(json.dumps(self._trains[key])):
                raise UserError(f"{directory} was written with another {key}; use a new output_dir")
        engine.load_state(directory)
        self.newest_step = self._begun_step = step
        return Progressed(**state)

    def _require_room(self, engine: Engine) -> None:
        """Refuse what will not fit, while the records, and that of this error, still have room."""
        lacking = ""
        if self._rank == 0 and self.newest_step is not None:
            newest = _directory(self._root, self.newest_step)
            needed = sum(entry["size"] for entry in _files_of(newest).values())
            free = shutil.disk_usage(self._root).free
            if free < needed:
                lacking = f"{self._root} has {free >> 20} MiB free, and the last checkpoint took {needed >> 20} MiB"
        lacking = engine.all_gather_text(lacking)[0]
        if lacking:
            raise CheckpointError(f"no space left on device: {lacking}")

    def _newest_whole(self, engine: Engine) -> int | None:
        """Return the step of the newest checkpoint that is whole; each rank reads its share of the files."""
        names = []
        if self._rank == 0:
            self._sweep()
            names = [directory.name for directory in _existing(self._root)]
        for name in reversed(json.loads(engine.all_gather_text(json.dumps(names))[0])):
            found = engine.all_gather_text(damage_of(self._root / name, self._rank, self._world_size) or "")
            damage = next(filter(None, found), None)
            if damage is None:
                if self._rank == 0:
                    self._point_at(name)
                return int(name.split("-")[1])
            if self._rank == 0:
                print(f"checkpoint {name} is not used: {damage}", file=sys.stderr, flush=True)
        return None

    def _save(self, engine: Engine, staged: StagedState, progressed: Progressed) -> _Saving:
        """Take a staged checkpoint to its place; each yield is a moment at which training may go on."""
        partial = _partial(self._root, progressed.step)
        parts = yield from self._on_all_ranks(engine, progressed.step, lambda: _written(partial, staged.write))
        write_index = staged.gather_index()

        def publish() -> Sums:
            if self._rank == 0:
                self._publish(partial, progressed, [*parts, _written(partial, write_index)])
            return {}

        published = yield from self._on_all_ranks(engine, progressed.step, publish)
        self.newest_step = progressed.step
        return published

    def _on_all_ranks(self, engine: Engine, step: int, work: Callable[[], Sums]) -> _Saving:
        """Do something in every rank's thread and return what came of it, in the order of ranks."""
        future = self._thread.submit(work)
        yield future
        while engine.any_flag(not future.done()):
            yield future
        error = future.exception()
        report = {"done": future.result()} if error is None else {"error": str(error) or repr(error)}
        reports = [json.loads(text) for text in engine.all_gather_text(json.dumps(report))]
        failures = [f"rank {rank}: {report['error']}" for rank, report in enumerate(reports) if "error" in report]
        if failures:
            if self._rank == 0:
                # The record of this error may need the room.
                shutil.rmtree(_partial(self._root, step), ignore_errors=True)
            message = f"the checkpoint of step {step} could not be written: {'; '.join(failures)}"
            raise CheckpointError(message) from error
        return [report["done"] for report in reports]

    def _publish(self, partial: Path, progressed: Progressed, parts: Sequence[Sums]) -> None:
        write_json(partial / _POSITION, {**asdict(progressed), **self._trains})
        parts = [*parts, _sums([partial / _POSITION])]
        sums = {name: entry for part in parts for name, entry in part.items()}
        manifest = {"format": _FORMAT, "step": progressed.step, "world_size": self._world_size}
        write_json(partial / _MANIFEST, {**manifest, "files": dict(sorted(sums.items()))})
        final = _directory(self._root, progressed.step)
        if final.exists():
            # It was found damaged: this run has not been here before.
            _discard(final)
        os.rename(partial, final)
        sync_directory(self._root)
        self._point_at(final.name)
        existing = _existing(self._root)
        newest = existing.index(final) + 1
        # What lies beyond this step was found damaged on resume: the run has not been there since.
        for directory in existing[: max(0, newest - self._keep)] + existing[newest:]:
            _discard(directory)

    def _point_at(self, name: str) -> None:
        latest = self._root / "latest"
        if not latest.exists() or latest.read_text(encoding="utf-8").strip() != name:
            write_text(latest, name + "\n")

    def _sweep(self) -> None:
        """Remove what an attempt that was killed was writing or removing, as far as that goes (see _discard)."""
        for leftover in self._root.glob(".*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                with suppress(OSError):
                    leftover.unlink()


def damage_of(directory: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Return what is wrong with a checkpoint, or None when every file is there with its size and SHA-256.

    With several ranks each looks at its share of the files, of about equally many bytes.
    """
    try:
        files = _files_of(directory)
        by_size = sorted(files, key=lambda name: (-files[name]["size"], name))
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest is missing or broken"
    for name in by_size[rank::ranks]:
        path, expected = directory / name, files[name]
        if not path.exists():
            return f"{name} is missing"
        try:
            if path.stat().st_size != expected["size"] or sha256_of(path) != expected["sha256"]:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _files_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of each file by its name, from the manifest."""
    files: dict[str, dict[str, Any]] = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))["files"]
    return files


def _written(directory: Path, write: Callable[[], list[Path]]) -> Sums:
    directory.mkdir(parents=True, exist_ok=True)
    return _sums(write())


def _sums(files: Sequence[Path]) -> Sums:
    return {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in files}


def _discard(directory: Path) -> None:
    """Remove a checkpoint so that none sees half of it.

    NFS keeps files that somebody reads, an export, say: no reason to end a run, and the next attempt tries again.
    """
    doomed = directory.with_name(f".{directory.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _directory(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def _partial(root: Path, step: int) -> Path:
    return root / f".step-{step:08d}.partial"


def newest_saved(output_dir: Path) -> int | None:
    """Return the step of the newest checkpoint that was published, None without one; it may have been damaged since."""
    published = _existing(output_dir / "checkpoints")
    return int(published[-1].name.split("-")[1]) if published else None


def _existing(root: Path) -> list[Path]:
    """Return the published checkpoints, oldest first."""
    return sorted(root.glob("step-????????"))
