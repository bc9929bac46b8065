"""The code that a run uses: a copy of the user's folder, and of our own agent and trainer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cpm_cluster
from cpm_cluster.runs.records import write_text
from cpm_cluster.runs.run import ID_PATTERN

MAX_BYTES = 200 << 20
MAX_FILES = 20_000
# What a folder without git may hold and no snapshot needs; hidden files (keys, caches) stay out, too.
LEFT_OUT = frozenset({"__pycache__", "venv", "node_modules"})
# Runs, whole or being made: they would hold each other.
RUN = re.compile(rf"{ID_PATTERN}|\.{ID_PATTERN}\.partial")
PACKAGE_PARTS = ("__init__.py", "agent", "diagnosis", "launch", "runs", "specs/problems.py", "training")


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
    """The git checkout that holds the job file, else the job file's folder; of a run's job file, that run's code."""
    folder = job_file.absolute().parent
    if (folder / "launch.json").is_file() and (folder / "code").is_dir():
        return folder / "code"
    top = _git(folder, "rev-parse", "--show-toplevel")
    return Path(top.rstrip("\n")) if top and top.strip() else folder


def take_snapshot(source: Path, target: Path) -> Snapshot:
    """Copy a folder: of a git checkout the files that git knows or does not ignore, as they are now; else all.

    Runs are left out. Symbolic links are copied as links. Raises SnapshotError where it is larger than 200 MiB or
    20,000 files.
    """
    commit = _git(source, "rev-parse", "HEAD")
    count, size = 0, 0
    for path in _files(source):
        relative = path.relative_to(source)
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
    """Our own agent and trainer, runnable as `python TARGET RUN_DIR` with the standard library alone.

    Bytecode comes along: times of files are kept, so that it stays valid for the same Python.
    """
    package = Path(cpm_cluster.__file__).parent
    for part in PACKAGE_PARTS:
        whole = package / part
        # not copytree, which gathers its errors in a list that says little to people
        for source in filter(Path.is_file, whole.rglob("*") if whole.is_dir() else (whole,)):
            copy = target / source.relative_to(package.parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    write_text(target / "__main__.py", "from cpm_cluster.agent.__main__ import main\n\nraise SystemExit(main())\n")


def _files(source: Path) -> Iterator[Path]:
    """What is copied, one after the other: whoever has seen enough need not wait for the rest of a large disk."""
    listed = _git(source, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if not listed:  # no checkout, or a folder that a checkout ignores
        yield from _walked(source)
        return
    for name in sorted(set(filter(None, listed.split("\0")))):
        path = source / name
        if any(map(RUN.fullmatch, Path(name).parts)):
            continue
        if path.is_symlink() or path.is_file():
            yield path
        elif (path / ".git").exists():  # a submodule, or a checkout inside: git lists it without what is in it
            yield from _files(path)


def _walked(source: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(source):
        here = Path(folder)
        names[:] = sorted(filter(_is_wanted, names))
        # os.walk neither descends into links to folders nor lists them as files
        yield from (here / name for name in names if (here / name).is_symlink())
        found = (here / name for name in sorted(filter(_is_wanted, files)))
        yield from (path for path in found if path.is_symlink() or path.is_file())


def _is_wanted(name: str) -> bool:
    return not (name.startswith(".") or name in LEFT_OUT or RUN.fullmatch(name))


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where there is no git, or the folder is no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "surrogateescape")
