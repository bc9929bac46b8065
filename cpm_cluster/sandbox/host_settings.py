"""What containers of an ordinary user need of this machine: changed with a record, and set back by it.

Sources: Docker's manual, "Rootless mode" (prerequisites, known limitations); containers-storage.conf(5). Where
/dev/net/tun is not for all to open, slirp4netns ends with "open: Permission denied"; /dev/fuse is fuse-overlayfs's.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cpm_cluster.runs.records import read_json, write_json
from cpm_cluster.sandbox.commands import run
from cpm_cluster.sandbox.state import Sandbox, SandboxError

DEVICES = (Path("/dev/net/tun"), Path("/dev/fuse"))
SYSCTLS = {
    "kernel/unprivileged_userns_clone": "1",  # Debian's own
    "kernel/apparmor_restrict_unprivileged_userns": "0",  # Ubuntu's own
}
SUBORDINATE_IDS = 65536
_SYSCTL = Path("/proc/sys")
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Before:
    """How this machine was: modes, kernel settings, mounts that were not shared, and what did not exist."""

    modes: dict[str, int] = field(default_factory=dict)
    sysctls: dict[str, str] = field(default_factory=dict)
    private_mounts: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


def apply(state: Sandbox, leftovers: tuple[Path, ...]) -> None:
    """Change what is not as it must be. `leftovers` are paths that daemons make and do not remove, inner ones first.

    Raises:
        SandboxError: the kernel or the account lacks something.
    """
    for device in DEVICES:
        if not device.exists():
            raise SandboxError(f"there is no {device}, which rootless containers need: modprobe {device.name}")
    _require_subordinate_ids(state)
    earlier, now = _read(state), _observe(leftovers)
    before = Before(
        modes={**now.modes, **earlier.modes},
        sysctls={**now.sysctls, **earlier.sysctls},
        private_mounts=earlier.private_mounts or now.private_mounts,
        absent=earlier.absent + [path for path in now.absent if path not in earlier.absent],
    )
    write_json(_record(state), asdict(before))
    for device in DEVICES:
        device.chmod(0o666)
    for name in now.sysctls:
        _set(name, SYSCTLS[name])
    # with this, what is unmounted on the machine is unmounted inside the containers' namespaces, too
    if "/" in now.private_mounts:
        run(["mount", "--make-rshared", "/"])


def restore(state: Sandbox) -> None:
    """Set back what `apply` changed, and remove what has appeared since."""
    before = _read(state)
    for path, mode in before.modes.items():
        if Path(path).exists():
            Path(path).chmod(mode)
    for name, value in before.sysctls.items():
        _set(name, value)
    mounted = set(shared_mounts(_MOUNTS.read_text()))
    for point in before.private_mounts:
        if point in mounted:
            run(["mount", "--make-private", point])
    for path in before.absent:
        _remove(Path(path))
    _record(state).unlink(missing_ok=True)


def shared_mounts(mountinfo: str) -> list[str]:
    """Mount points in a peer group (proc(5), mountinfo: optional field `shared:N`)."""
    return [point for point, fields in _mounts(mountinfo) if any(word.startswith("shared:") for word in fields)]


def private_mounts(mountinfo: str) -> list[str]:
    """Mount points in none."""
    shared = set(shared_mounts(mountinfo))
    return [point for point, _ in _mounts(mountinfo) if point not in shared]


def subordinate_ids(table: str, user: str, uid: int) -> int:
    """How many ids /etc/subuid or /etc/subgid grants a user (subuid(5): NAME_OR_UID:FIRST:COUNT)."""
    rows = [line.split(":") for line in table.splitlines() if line.count(":") == 2]
    return sum(int(count) for name, _, count in rows if name in {user, str(uid)})


def _mounts(mountinfo: str) -> Iterator[tuple[str, list[str]]]:
    for line in mountinfo.splitlines():
        words = line.split()
        yield words[4].encode().decode("unicode_escape"), words[6 : words.index("-")]


def _observe(leftovers: tuple[Path, ...]) -> Before:
    return Before(
        modes={str(device): stat.S_IMODE(device.stat().st_mode) for device in DEVICES},
        sysctls={name: (_SYSCTL / name).read_text().strip() for name in SYSCTLS if (_SYSCTL / name).exists()},
        private_mounts=private_mounts(_MOUNTS.read_text()),
        absent=[str(path) for path in leftovers if not path.exists()],
    )


def _require_subordinate_ids(state: Sandbox) -> None:
    """useradd grants them, where /etc/login.defs lets it."""
    for kind in ("subuid", "subgid"):
        table = Path("/etc", kind)
        text = table.read_text() if table.exists() else ""
        if subordinate_ids(text, state.user, state.uid) < SUBORDINATE_IDS:
            first = max([100_000, *(int(line.split(":")[1]) + int(line.split(":")[2]) for line in text.splitlines())])
            run(["usermod", f"--add-{kind}s", f"{first}-{first + SUBORDINATE_IDS - 1}", state.user])


def _set(name: str, value: str) -> None:
    if (_SYSCTL / name).read_text().strip() != value:
        (_SYSCTL / name).write_text(value)


def _remove(path: Path) -> None:
    """A file, or a folder that is empty."""
    try:
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    except OSError:
        pass


def _record(state: Sandbox) -> Path:
    return state.etc / "machine-before.json"


def _read(state: Sandbox) -> Before:
    return Before(**(read_json(_record(state)) or {}))
