"""Docker with a daemon of root: `docker run` in the foreground, held by the node agent."""

from __future__ import annotations

from typing import Iterable, Iterator, Sequence

from cpm_cluster.launch.plan import Container, LaunchPlan, Mount, NodeFacts, Setting, options
from cpm_cluster.launch.program import program_argv

PROGRAM = "docker"


def run_options(plan: LaunchPlan, node: NodeFacts) -> tuple[Setting, ...]:
    """Options of `docker run`, without those of a terminal."""
    container = plan.container
    assert container is not None
    return (*_identity(plan, node), *_resources(plan, container, node), *_files(plan, container, node))


def run_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """`docker run … IMAGE PROGRAM`."""
    return container_argv(PROGRAM, plan, run_options(plan, node), program_argv(plan, node))


def shell_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """`docker run --interactive --tty … IMAGE bash`, without what only a run has."""
    return container_argv(PROGRAM, plan, shell_options(plan, node), ["bash"])


def shell_options(plan: LaunchPlan, node: NodeFacts) -> Iterator[Setting]:
    """Options of an interactive container: a terminal, the same resources and mounts, the variables one by one."""
    container = plan.container
    assert container is not None
    for name in ("interactive", "tty", "rm", "init"):
        yield Setting(name, None, "computed")
    yield from _resources(plan, container, node)
    for variable in plan.environment:
        if variable.name != "PYTHONPATH":
            yield Setting("env", f"{variable.name}={variable.value}", variable.set_by)
    yield from _user_and_mounts(container, skip=plan.run_dir)
    if not plan.workdir.startswith(f"{plan.run_dir}/"):
        yield workdir_setting("workdir", plan.workdir, plan.workdir_set_by)


def container_argv(program: str, plan: LaunchPlan, settings: Iterable[Setting], inside: Sequence[str]) -> list[str]:
    """The argv of docker, or of a program with docker's command line."""
    assert plan.container is not None
    return [program, "run", *options(settings), plan.container.image, *inside]


def _identity(plan: LaunchPlan, node: NodeFacts) -> Iterator[Setting]:
    yield Setting("init", None, "computed", "a real init forwards signals to the program and reaps zombies")
    yield Setting(
        "name",
        f"{plan.run_id}-{node.attempt}-{node.index}",
        "computed",
        "a name of this run, attempt and node: two jobs of one user on a node do not meet",
    )
    yield Setting("cidfile", node.container_id_file, "computed", "by its id the container is inspected and removed")
    for label, value in (("run", plan.run_id), ("job", node.job_id), ("attempt", node.attempt), ("node", node.name)):
        yield Setting("label", f"cpm.{label}={value}", "computed", "orphans of dead jobs are found by these labels")
    yield Setting(
        "stop-timeout",
        str(plan.signal_lead_s),
        "computed",
        "signal_lead: docker kills after 10 s by default; a checkpoint takes longer",
    )
    yield Setting("log-driver", "local", "computed", "bounded; the agent keeps the whole output of each rank")


def _resources(plan: LaunchPlan, container: Container, node: NodeFacts) -> Iterator[Setting]:
    yield Setting(
        "network",
        "host",
        "computed",
        "NCCL needs the node's own interfaces and addresses; the manual's rootless line lacks it",
    )
    if container.shm_bytes is None:
        yield Setting("ipc", "host", container.shm_set_by, container.shm_why)
    else:
        yield Setting("shm-size", str(container.shm_bytes), container.shm_set_by, container.shm_why)
    for limit in node.ulimits:
        yield Setting("ulimit", limit, "computed", "pinned memory, deep stacks and sockets of NCCL and torch")
    if plan.gpus_per_node:
        yield Setting(
            "gpus",
            '"device={}"'.format(",".join(node.gpu_uuids)),
            "computed",
            "the GPUs of this step by UUID, as nvidia-smi -L lists them inside it: `all`, as in the manual, would take"
            " the GPUs of other jobs on the node; docker needs the inner quotes",
        )
    if container.infiniband:
        why = "the cluster's network.infiniband; without the device NCCL falls back to sockets silently"
        yield Setting("device", "/dev/infiniband", "computed", why)


def _files(plan: LaunchPlan, container: Container, node: NodeFacts) -> Iterator[Setting]:
    yield Setting(
        "env-file",
        node.environment_file,
        "computed",
        "mode 0600: values stay out of process lists, and commas in them whole",
    )
    yield from _user_and_mounts(container)
    yield workdir_setting("workdir", plan.workdir, plan.workdir_set_by)


def _user_and_mounts(container: Container, skip: str = "") -> Iterator[Setting]:
    if container.user is not None:
        yield Setting("user", container.user, "computed", "files in the run directory belong to you, not to root")
    for mount in container.mounts:
        if mount.source != skip:
            yield mount_setting(mount)
    if container.host_sys:
        sys = Mount("/sys", "/sys", True, "computed")
        yield mount_setting(sys, "rootless Docker with a host network leaves /sys out; NCCL reads its topology there")


def workdir_setting(name: str, workdir: str, set_by: str) -> Setting:
    """The working directory inside the container."""
    return Setting(name, workdir, set_by, "the snapshot of your code" if set_by == "computed" else "")


def mount_setting(mount: Mount, why: str = "") -> Setting:
    """`type=bind,source=…,target=…[,readonly]`, which docker and podman read as a line of CSV."""
    fields = ["type=bind", f"source={mount.source}", f"target={mount.target}"]
    fields += ["readonly"] if mount.read_only else []
    return Setting("mount", ",".join(map(_csv_field, fields)), mount.set_by, why)


def _csv_field(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if "," in text or '"' in text else text
