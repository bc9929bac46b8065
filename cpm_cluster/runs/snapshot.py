"""The code that a run uses: a copy of the user's folder, and of our own agent and trainer."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cpm_cluster
from cpm_cluster.runs.records import write_text

MAX_BYTES = 200 << 20
MAX_FILES = 20_000
# What no snapshot needs: caches, environments, and runs, which would hold each other.
LEFT_OUT = frozenset({".git", ".hg", "__pycache__", ".venv", "venv", "node_modules", ".mypy_cache", ".ruff_cache"})
PACKAGE_PARTS = ("__init__.py", "agent", "launch", "runs", "training")


class SnapshotError(Exception):
    """The folder cannot be copied; the message says why and what to do."""


@dataclass(frozen=True)
class Snapshot:
    """What was copied: `commit` and whether there were changes beyond it, where the folder is a git checkout."""

    source: str
    files: int
    bytes: int
    commit: str | None
    changed: bool


def default_source(job_file: Path) -> Path:
    """The git checkout that holds the job file, else the job file's folder."""
    folder = job_file.absolute().parent
    top = _git(folder, "rev-parse", "--show-toplevel")
    return Path(top.strip()) if top and top.strip() else folder


def take_snapshot(source: Path, target: Path, runs_dir: Path) -> Snapshot:
    """Copy a folder: of a git checkout the files that git knows or does not ignore, as they are now; else all.

    Symbolic links are copied as links. Raises SnapshotError where it is larger than 200 MiB or 20,000 files.
    """
    commit = _git(source, "rev-parse", "HEAD")
    count, size = 0, 0
    for relative in _files(source, runs_dir):
        path = source / relative
        count, size = count + 1, size + path.lstat().st_size
        if size > MAX_BYTES or count > MAX_FILES:
            raise SnapshotError(
                f"{source} is larger than {MAX_BYTES >> 20} MiB or {MAX_FILES:,} files: no code; name the folder of"
                " your code with `code:` in the job file, or list data and weights in .gitignore"
            )
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target / relative, follow_symlinks=False)
    target.mkdir(parents=True, exist_ok=True)
    changed = bool((_git(source, "status", "--porcelain") or "").strip())
    return Snapshot(str(source), count, size, commit.strip() if commit else None, changed)


def copy_package(target: Path) -> None:
    """Our own agent and trainer, runnable as `python TARGET RUN_DIR` with the standard library alone."""
    package = Path(cpm_cluster.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__")
    for part in PACKAGE_PARTS:
        source, copy = package / part, target / "cpm_cluster" / part
        if source.is_dir():
            shutil.copytree(source, copy, ignore=ignore)
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    write_text(target / "__main__.py", "from cpm_cluster.agent.__main__ import main\n\nraise SystemExit(main())\n")


def _files(source: Path, runs_dir: Path) -> Iterator[Path]:
    """Relative paths of what is copied, sorted."""
    listed = _git(source, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    relative = map(Path, filter(None, listed.split("\0"))) if listed is not None else _walked(source, runs_dir)
    for path in sorted(set(relative)):
        full = source / path
        if not full.is_relative_to(runs_dir) and (full.is_file() or full.is_symlink()):
            yield path


def _walked(source: Path, runs_dir: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(source):
        here = Path(folder)
        names[:] = [name for name in names if name not in LEFT_OUT and here / name != runs_dir]
        yield from ((here / name).relative_to(source) for name in files)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where there is no git, or the folder is no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "surrogateescape")
