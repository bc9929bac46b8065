"""What containers of an ordinary user need of this machine: changed with a record, and set back by it.

Sources: Docker's manual, "Rootless mode" (prerequisites); what rootlesskit 1.1 and podman 4.3 say. Where /dev/net/tun
is not for all to open, rootlesskit ends with "open: Permission denied"; /dev/fuse is what fuse-overlayfs needs.
"""

from __future__ import annotations

import stat
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
    """How this machine was: modes of files, kernel settings, whether `/` was a shared mount, what did not exist."""

    modes: dict[str, int] = field(default_factory=dict)
    sysctls: dict[str, str] = field(default_factory=dict)
    root_shared: bool = True
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
        root_shared=earlier.root_shared and now.root_shared,
        absent=earlier.absent + [path for path in now.absent if path not in earlier.absent],
    )
    write_json(_record(state), asdict(before))
    for device in DEVICES:
        device.chmod(0o666)
    for name in now.sysctls:
        _set(name, SYSCTLS[name])
    # rootlesskit and podman ask for it: what is unmounted on the machine is unmounted in their namespaces, too
    if not now.root_shared:
        run(["mount", "--make-shared", "/"])


def restore(state: Sandbox) -> None:
    """Set back what `apply` changed, and remove what has appeared since."""
    before = _read(state)
    for path, mode in before.modes.items():
        if Path(path).exists():
            Path(path).chmod(mode)
    for name, value in before.sysctls.items():
        _set(name, value)
    if not before.root_shared and root_is_shared(_MOUNTS.read_text()):
        run(["mount", "--make-private", "/"])
    for path in before.absent:
        _remove(Path(path))
    _record(state).unlink(missing_ok=True)


def root_is_shared(mountinfo: str) -> bool:
    """Whether `/` is in a peer group: proc(5), mountinfo, optional field `shared:N`."""
    mounts = [line.split() for line in mountinfo.splitlines()]
    last = [words for words in mounts if words[4] == "/"][-1]
    return any(word.startswith("shared:") for word in last[6 : last.index("-")])


def ids_of(state: Sandbox) -> list[range]:
    """The user ids of the ordinary user: its own, and those that its containers have."""
    table = Path("/etc/subuid")
    granted = subordinate_ids(table.read_text(), state.user, state.uid) if table.exists() else []
    return [range(state.uid, state.uid + 1), *granted]


def subordinate_ids(table: str, user: str, uid: int) -> list[range]:
    """The ids that /etc/subuid or /etc/subgid grants a user (subuid(5): NAME_OR_UID:FIRST:COUNT)."""
    rows = [line.split(":") for line in table.splitlines() if line.count(":") == 2]
    return [range(int(first), int(first) + int(count)) for name, first, count in rows if name in {user, str(uid)}]


def _observe(leftovers: tuple[Path, ...]) -> Before:
    return Before(
        modes={str(device): stat.S_IMODE(device.stat().st_mode) for device in DEVICES},
        sysctls={name: (_SYSCTL / name).read_text().strip() for name in SYSCTLS if (_SYSCTL / name).exists()},
        root_shared=root_is_shared(_MOUNTS.read_text()),
        absent=[str(path) for path in leftovers if not path.exists()],
    )


def _require_subordinate_ids(state: Sandbox) -> None:
    """useradd grants them, where /etc/login.defs lets it."""
    for kind in ("subuid", "subgid"):
        table = Path("/etc", kind)
        text = table.read_text() if table.exists() else ""
        if sum(map(len, subordinate_ids(text, state.user, state.uid))) < SUBORDINATE_IDS:
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
