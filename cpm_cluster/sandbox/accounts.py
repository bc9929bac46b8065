"""The ordinary user of the sandbox, on this machine."""

from __future__ import annotations

import pwd

from cpm_cluster.sandbox.commands import run
from cpm_cluster.sandbox.state import Sandbox


def make_user(state: Sandbox) -> None:
    """The account, which stays when the sandbox goes, and its home, which does not."""
    if not exists(state):
        # not a system user: useradd gives those no subordinate ids, which rootless containers need
        run(["useradd", "--no-create-home", "--home-dir", str(state.home), "--shell", "/bin/bash", state.user])
    elif pwd.getpwnam(state.user).pw_dir != str(state.home):
        run(["usermod", "--home", str(state.home), state.user])
    if not state.home.exists():
        run(["install", "-d", "-m", "0755", str(state.home.parent)])
        run(["install", "-d", "-m", "0700", "-o", state.user, "-g", str(state.gid), str(state.home)])


def remove_user(state: Sandbox) -> None:
    """The account, with its group and its subordinate ids."""
    if exists(state):
        run(["userdel", state.user])


def exists(state: Sandbox) -> bool:
    """Whether the account is there."""
    return any(entry.pw_name == state.user for entry in pwd.getpwall())
