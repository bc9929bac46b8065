"""Checkpoints: written aside, summed, renamed; found again newest first, and only when whole.

``checkpoints/step-00000100/`` holds the engine's files, ``position.json`` and ``manifest.json`` (step, world
size, and each file's size and SHA-256). ``checkpoints/latest`` names the newest directory.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from cpm_cluster.training.engines import Engine
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import sha256_of, sync_directory, write_json, write_text
from cpm_cluster.training.packing import Position
from cpm_cluster.training.settings import Settings

_MANIFEST, _POSITION = "manifest.json", "position.json"


@dataclass(frozen=True)
class Progressed:
    """How far a run has come: finished steps, tokens seen by all ranks, and where the data stream stands."""

    step: int
    tokens_seen: int
    epoch: int
    row: int

    @property
    def position(self) -> Position:
        """The data stream's position."""
        return Position(self.epoch, self.row)


START = Progressed(step=0, tokens_seen=0, epoch=0, row=0)


class Checkpoints:
    """The checkpoints of one run; rank 0 handles the directories, the engine's ranks write into them."""

    def __init__(self, settings: Settings, rank: int) -> None:
        self._root = Path(settings.output_dir) / "checkpoints"
        self._keep = settings.training.checkpoint.keep
        self._world_size = settings.expected_world_size
        self._trains = {"model": asdict(settings.model), "method": asdict(settings.method)}
        self._rank = rank
        self.newest_step: int | None = None

    def save(self, engine: Engine, progressed: Progressed) -> None:
        """Write a checkpoint of this step, make it the latest, remove what exceeds ``keep``. Collective."""
        partial = self._root / f".step-{progressed.step:08d}.partial"
        if self._rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        engine.barrier()
        engine.save_state(partial)
        engine.barrier()
        if self._rank == 0:
            write_json(partial / _POSITION, {**asdict(progressed), **self._trains})
            write_json(partial / _MANIFEST, _manifest(partial, progressed.step, self._world_size))
            self._publish(partial, _directory(self._root, progressed.step))
        engine.barrier()
        self.newest_step = progressed.step

    def resume(self, engine: Engine) -> Progressed:
        """Load the newest whole checkpoint into the engine and return how far it had come; START without one.

        Raises UserError when the checkpoint is of another model or method. Collective.
        """
        found = self._newest_whole() if self._rank == 0 else None
        step = engine.all_gather(-1 if found is None else found)[0]
        if step < 0:
            return START
        directory = _directory(self._root, step)
        state: dict[str, object] = json.loads((directory / _POSITION).read_text(encoding="utf-8"))
        for key in self._trains:
            if state.pop(key) != json.loads(json.dumps(self._trains[key])):
                raise UserError(f"{directory} was written with another {key}; use a new output_dir")
        engine.load_state(directory)
        self.newest_step = step
        return Progressed(**state)  # type: ignore[arg-type]

    def _newest_whole(self) -> int | None:
        for directory in reversed(_existing(self._root)):
            damage = damage_of(directory)
            if damage is None:
                return int(directory.name.split("-")[1])
            print(f"checkpoint {directory.name} is not used: {damage}", file=sys.stderr, flush=True)
        return None

    def _publish(self, partial: Path, final: Path) -> None:
        # A directory of that name is one that was found damaged: this run has not been here before.
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        sync_directory(self._root)
        write_text(self._root / "latest", final.name + "\n")
        existing = _existing(self._root)
        newest = existing.index(final) + 1
        # What lies beyond this step was found damaged on resume: the run has not been there since.
        for directory in existing[: max(0, newest - self._keep)] + existing[newest:]:
            shutil.rmtree(directory)


def damage_of(directory: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None when every file is there with its size and SHA-256."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, object]] = manifest["files"]
    except (OSError, ValueError, KeyError):
        return "its manifest is missing or broken"
    for name, expected in files.items():
        path = directory / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"] or sha256_of(path) != expected["sha256"]:
            return f"{name} is not what was written"
    return None


def _manifest(directory: Path, step: int, world_size: int) -> dict[str, object]:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(directory.iterdir())
    }
    return {"format": 1, "step": step, "world_size": world_size, "files": files}


def _directory(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def _existing(root: Path) -> list[Path]:
    """Return the published checkpoints, oldest first."""
    return sorted(root.glob("step-????????"))
