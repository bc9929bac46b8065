"""The accounting database, and what slurmdbd is told first: the cluster, an account, its users."""

from __future__ import annotations

from cpm_cluster.sandbox.commands import run, wait_for
from cpm_cluster.sandbox.state import Sandbox, SandboxError

ACCOUNT = "sandbox"

# over the socket the kernel says who asks: there is no password to keep
_GRANT = """\
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED VIA unix_socket;
GRANT ALL ON slurm_acct_db.* TO slurm@localhost;
"""


def create(state: Sandbox) -> None:
    """The files of an empty database, before mariadbd starts."""
    if (state.root / "mariadb" / "mysql").exists():
        return
    run(
        [
            "mariadb-install-db",
            f"--defaults-file={state.etc / 'mariadb.cnf'}",
            "--user=mysql",
            "--auth-root-authentication-method=socket",
            "--skip-test-db",
        ],
        patience_s=120,
    )


def let_slurm_in(state: Sandbox) -> None:
    """Slurm's database and its user, once mariadbd runs."""
    run(["mariadb", "--no-defaults", f"--socket={state.database_socket}"], stdin=_GRANT)


def register(state: Sandbox) -> None:
    """Make the cluster, an account and its users known to slurmdbd.

    Raises:
        SandboxError: slurmdbd does not take them in time.
    """
    for words in (
        ["cluster", "sandbox"],
        ["account", ACCOUNT, "Description=sandbox", "Organization=sandbox"],
        ["user", f"{state.user},root", f"Account={ACCOUNT}"],
    ):
        _add(state, words)


def _add(state: Sandbox, words: list[str]) -> None:
    message = ""

    def added() -> bool:
        nonlocal message
        try:
            run(["sacctmgr", "--immediate", "add", *words], environment={"SLURM_CONF": str(state.slurm_conf)})
        except SandboxError as error:
            message = str(error)
            # code 1, too, for what is there already
            return any(words in message for words in ("already exists", "Nothing new added"))
        return True

    if not wait_for(added, 30, pause_s=0.5):
        raise SandboxError(message)
