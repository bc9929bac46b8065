"""Records that are either whole or absent, and event logs. Standard library only: the node agent writes them, too."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Create or replace a file: temporary name, fsync, rename, fsync of the folder.

    Raises:
        OSError: the folder cannot be written; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """As `write_atomically`, as UTF-8."""
    write_atomically(path, text.encode("utf-8"), mode)


def write_json(path: Path, value: Any) -> None:
    """As `write_atomically`, as indented JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file or no JSON object in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def append_event(path: Path, kind: str, **details: Any) -> None:
    """Add one line {time, kind, …} to an event log, and sync it. It never joins a line that an earlier writer tore."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": time.time(), "kind": kind, **details}, ensure_ascii=False) + "\n"
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All events of all writers in the order of time, each with its `writer`."""
    found = [{**event, "writer": path.stem} for path in sorted(folder.glob("*.jsonl")) for event in read_lines(path)]
    whole = [event for event in found if isinstance(event.get("time"), (int, float)) and "kind" in event]
    return sorted(whole, key=lambda event: float(event["time"]))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a jsonl file; a torn line is left out, and a file that is not there has none."""
    try:
        # not splitlines: texts may hold U+0085 or U+2028, at which it would split, too
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    return [value for value in map(_parsed, lines) if isinstance(value, dict)]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
