"""The life of the sandbox: up, down, status."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.sandbox import (
    accounts,
    cgroups,
    containers,
    daemons,
    database,
    folders,
    gpus,
    network,
    processes,
    requirements,
    slurm_conf,
)
from cpm_cluster.sandbox.commands import run, wait_for
from cpm_cluster.sandbox.progress import note, step
from cpm_cluster.sandbox.state import Part, Sandbox, SandboxError

# a job's processes have KillWait (60 s) to end
PATIENCE_WITH_JOBS_S = 75.0
# one second on idle cores
PATIENCE_WITH_NODES_S = 120.0
PATIENCE_WITH_LEFTOVERS_S = 5.0
# sinfo adds a `*` where a node does not answer
USABLE = ("idle", "planned", "mixed", "allocated", "completing")


@dataclass(frozen=True, kw_only=True)
class NodeStatus:
    """A node, as its cable and as Slurm have it."""

    name: str
    address: str
    link_up: bool
    state: str


@dataclass(frozen=True)
class PartitionStatus:
    """A partition, as Slurm has it."""

    name: str
    nodes: str
    time_limit: str
    preempt_mode: str


@dataclass(frozen=True, kw_only=True)
class Status:
    """What `status` tells."""

    root: str
    slurm_conf: str
    daemons: tuple[Part, ...]
    nodes: tuple[NodeStatus, ...]
    partitions: tuple[PartitionStatus, ...]
    containers: tuple[Part, ...]

    @property
    def is_up(self) -> bool:
        """Whether Slurm can run jobs on all nodes."""
        return all(part.up for part in self.daemons) and all(node.state in USABLE for node in self.nodes)


def up(state: Sandbox, *, install: bool, with_containers: bool) -> None:
    """Bring everything up, or what is missing of it.

    Raises:
        SandboxError: what is missing or in the way, in one sentence.
    """
    requirements.require_root()
    packages = {**requirements.PACKAGES, **(containers.PACKAGES if with_containers else {})}
    requirements.require_packages(packages, install)
    network.require_free(state)
    folders.make_root(state)
    with folders.held(state):
        confinement = cgroups.confinement()
        if confinement.caveat:
            note(confinement.caveat)
        with step("folders, user, pretend GPUs"):
            folders.make(state)
            accounts.make_user(state)
            gpus.make_devices(state)
            changed = slurm_conf.write(slurm_conf.render(state, confinement))
        with step("network of the nodes"):
            network.up(state)
        if changed:
            _stop_slurm(state)
        _start_accounting(state)
        _start_slurm(state)
        if with_containers:
            containers.up(state)


def down(state: Sandbox, *, keep_files: bool, purge: bool) -> None:
    """End everything, and remove it but for packages; the folder and the user account where they are not to be kept.

    Raises:
        SandboxError: what does not end or cannot be removed.
    """
    requirements.require_root()
    if network.is_up(state):
        folders.claim(state)  # someone may have removed it from under the daemons
    if folders.is_ours(state):
        with folders.held(state):
            _end_everything(state)
            if not keep_files:
                with step(str(state.root)):
                    folders.remove_root(state)
    else:
        note(f"there is no sandbox in {state.root}")
    if purge:
        accounts.remove_user(state)


def status(state: Sandbox) -> Status:
    """What runs, for any user."""
    parts = tuple(
        Part(name=daemon.name, up=daemon.is_alive, detail=f"pid {daemon.file.pid}" if daemon.is_alive else "")
        for daemon in daemons.all_daemons(state)
    )
    states = _node_states(state)
    nodes = tuple(
        NodeStatus(
            name=node.name,
            address=str(node.address),
            link_up=network.link_is_up(node),
            state=states.get(node.name, "unknown"),
        )
        for node in state.nodes
    )
    return Status(
        root=str(state.root),
        slurm_conf=str(state.slurm_conf),
        daemons=parts,
        nodes=nodes,
        partitions=tuple(_partitions(state)),
        containers=tuple(containers.status(state)),
    )


def _start_accounting(state: Sandbox) -> None:
    with step("munge"):
        daemons.munged(state).start()
    with step("accounting: mariadb, slurmdbd"):
        database.create(state)
        daemons.mariadbd(state).start()
        database.let_slurm_in(state)
        daemons.slurmdbd(state).start()
        database.register(state)


def _start_slurm(state: Sandbox) -> None:
    with step("slurmctld"):
        daemons.slurmctld(state).start()
    with step(f"slurmd of {len(state.nodes)} nodes"):
        silent = [name for name, what in _node_states(state).items() if what.endswith("*")]
        for node in state.nodes:
            # slurmctld asks a DOWN node again after ten minutes; a slurmd that starts reports at once
            if node.name in silent:
                daemons.slurmd(state, node).stop()
            daemons.slurmd(state, node).start()
        if not wait_for(lambda: _resume(state), PATIENCE_WITH_NODES_S, pause_s=0.5):
            found = ", ".join(f"{name} is {what}" for name, what in sorted(_node_states(state).items()))
            raise SandboxError(f"not all nodes can be used: {found}; see {state.log}")


def _stop_slurm(state: Sandbox) -> None:
    """For a changed configuration; jobs go on without the daemons."""
    for daemon in reversed(daemons.all_daemons(state)):
        if daemon.name.startswith("slurm"):
            daemon.stop()


def _resume(state: Sandbox) -> bool:
    """Whether all nodes can be used; those that were taken out of service are brought back."""
    states = _node_states(state)
    out = sorted(name for name, what in states.items() if what.startswith(("drain", "down")) and not what.endswith("*"))
    if out:
        _slurm(state, "scontrol", "update", f"nodename={','.join(out)}", "state=resume")
    return set(states) == set(state.node_names) and all(what in USABLE for what in states.values())


def _end_everything(state: Sandbox) -> None:
    _end_jobs(state)
    with step("containers"):
        containers.down(state)
    with step("daemons"):
        for daemon in reversed(daemons.all_daemons(state)):
            daemon.stop()
    # names of nodes and namespaces are the same in every folder
    if network.is_up_elsewhere(state):
        return
    with step("what jobs have left"):
        _end_leftovers(state)
    with step("network of the nodes"):
        network.down(state)


def _end_jobs(state: Sandbox) -> None:
    """Cancel all jobs, and give them the time that Slurm gives."""
    jobs = _jobs(state)
    if not jobs:
        return
    with step(f"{len(jobs)} jobs cancelled"):
        _asked(state, "scancel", *jobs)
        wait_for(lambda: not _jobs(state), PATIENCE_WITH_JOBS_S, pause_s=0.5)


def _end_leftovers(state: Sandbox) -> None:
    namespaces = [host.netns for host in state.hosts]
    left = processes.end_all(
        lambda: processes.in_namespaces(namespaces) | cgroups.processes(state), PATIENCE_WITH_LEFTOVERS_S
    )
    if left:
        raise SandboxError(f"processes {', '.join(map(str, sorted(left)))} do not end, not even by SIGKILL")
    groups = cgroups.remove(state)
    if groups:
        raise SandboxError(f"the control group {groups[0]} cannot be removed")


def _jobs(state: Sandbox) -> list[str]:
    return _asked(state, "squeue", "--noheader", "--format=%A")


def _node_states(state: Sandbox) -> dict[str, str]:
    """Node → state, as sinfo writes it: `idle*` for one that does not answer; empty where Slurm does not answer."""
    return dict(line.split() for line in _asked(state, "sinfo", "--noheader", "--Node", "--format=%N %T"))


def _partitions(state: Sandbox) -> list[PartitionStatus]:
    lines = _asked(state, "sinfo", "--noheader", "--format=%R %N %l %M")
    return [PartitionStatus(*line.split()) for line in lines]


def _asked(state: Sandbox, *argv: str) -> list[str]:
    """Lines of an answer; none where those are not there for whom Slurm's programs wait long."""
    if not (daemons.munged(state).is_alive and daemons.slurmctld(state).is_alive):
        return []
    try:
        return _slurm(state, *argv).splitlines()
    except SandboxError:
        return []


def _slurm(state: Sandbox, *argv: str) -> str:
    return run(argv, environment={"SLURM_CONF": str(state.slurm_conf)})
