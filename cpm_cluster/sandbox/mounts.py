"""What is mounted where (proc(5), mountinfo)."""

from __future__ import annotations

import re
from pathlib import Path


def mount_points() -> list[Path]:
    """All of them, in the order in which they were mounted.

    os.path.ismount does not know a folder that is mounted on itself.
    """
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4])) for line in lines]


def below(root: Path) -> list[Path]:
    """The mount points below a folder, the last one first."""
    return [path for path in reversed(mount_points()) if path != root and path.is_relative_to(root)]
