"""What Slurm is told: directives of the batch script, options of its srun, and of an interactive srun."""

from __future__ import annotations

from collections.abc import Iterator

from cpm_cluster.launch.origins import set_by
from cpm_cluster.launch.plan import Setting
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.values import slurm_time

ONE_TASK = (
    "one task on each node holds all its GPUs and starts the ranks; the manual's -n 8 would start eight of everything"
)
GPUS = "{} GPUs on each node; Slurm takes either gres or gpus-per-node (man sbatch), this site {}"


def batch_options(spec: JobSpec, run_dir: str) -> tuple[Setting, ...]:
    """The `#SBATCH` directives, in order."""
    return (*_place(spec), *_size(spec), *_life(spec), *_records(run_dir), *_extra(spec))


def step_options(spec: JobSpec) -> tuple[Setting, ...]:
    """Options of the srun inside the batch script.

    Restated, because srun inherits some of them only in some versions (22.05 to 23.02 drop --cpus-per-task).
    """
    return (
        _number_of_nodes(spec),
        Setting("ntasks-per-node", "1", "computed", ONE_TASK),
        *_cpus(spec),
        *_gpus(spec),
        Setting("mem", "0", "computed", "the step may use all memory of the allocation"),
        Setting("cpu-bind", "none", "computed", "the default would put all ranks of a node on one core"),
        Setting("kill-on-bad-exit", "1", "computed", "one failed node ends the step, not a hang of the others"),
        Setting(
            "wait",
            str(_lead(spec)),
            "computed",
            "signal_lead: once a node has finished, the others have the time"
            " of a checkpoint for the rest, such as node 0, which saves the model",
        ),
        Setting("unbuffered", None, "computed", "logs as they are written"),
    )


def interactive_options(spec: JobSpec) -> tuple[Setting, ...]:
    """Options of `srun … --pty bash`, to work by hand on one such node."""
    place, nodes = tuple(_place(spec)), _number_of_nodes(spec)
    if spec.resources.nodes > 1:
        place = tuple(setting for setting in place if setting.name != "nodelist")
        nodes = Setting(
            "nodes", "1", "computed", "srun gives the terminal to the first task; the other nodes would idle"
        )
    time = (Setting("time", slurm_time(spec.time_limit_s), set_by(spec, "time_limit")),) if spec.time_limit_s else ()
    one_task = Setting(
        "ntasks-per-node", "1", "computed", "the manual's -n 8 gives a terminal to the first of eight shells only"
    )
    return (*place, nodes, one_task, *_cpus(spec), *_gpus(spec), *_memory(spec), *time)


def _place(spec: JobSpec) -> Iterator[Setting]:
    for name in ("partition", "nodelist", "exclude", "account", "qos", "reservation", "constraint"):
        value = getattr(spec.slurm, name)
        if value is not None:
            yield Setting(name, value, set_by(spec, f"slurm.{name}"))


def _size(spec: JobSpec) -> Iterator[Setting]:
    yield _number_of_nodes(spec)
    yield Setting("ntasks-per-node", "1", "computed", ONE_TASK)
    yield from _cpus(spec)
    yield from _gpus(spec)
    yield from _memory(spec)


def _number_of_nodes(spec: JobSpec) -> Setting:
    return Setting("nodes", str(spec.resources.nodes), set_by(spec, "resources.nodes"))


def cpus_per_node(spec: JobSpec) -> int | None:
    """CPUs of the job on a node: as stated, or the share of the node's CPUs that goes with its GPUs."""
    stated, cluster = spec.resources.cpus_per_node, spec.cluster
    if stated is not None or not cluster.cpus_per_node:
        return stated
    if not cluster.gpus_per_node or not spec.resources.gpus_per_node:
        return cluster.cpus_per_node
    return max(1, cluster.cpus_per_node * spec.resources.gpus_per_node // cluster.gpus_per_node)


def _cpus(spec: JobSpec) -> Iterator[Setting]:
    cpus = cpus_per_node(spec)
    if cpus is not None:
        stated = spec.resources.cpus_per_node is not None
        why = "the share of the node's CPUs that goes with its GPUs; BMTrain and the loaders split it between the ranks"
        yield Setting(
            "cpus-per-task", str(cpus), set_by(spec, "resources.cpus_per_node") if stated else "computed", why
        )


def _gpus(spec: JobSpec) -> Iterator[Setting]:
    count = spec.resources.gpus_per_node
    if not count:
        return
    way = spec.cluster.gpu_request
    value = f"gpu:{count}" if way == "gres" else str(count)
    yield Setting(way, value, set_by(spec, "resources.gpus_per_node"), GPUS.format(count, way))


def whole_nodes(spec: JobSpec) -> bool:
    """Whether the job has all GPUs of its nodes, and so the nodes for itself."""
    return bool(spec.resources.gpus_per_node) and spec.resources.gpus_per_node == spec.cluster.gpus_per_node


def _memory(spec: JobSpec) -> Iterator[Setting]:
    if whole_nodes(spec):
        yield Setting("exclusive", None, "computed", "all GPUs of the node are used: nobody else can run there anyway")
        yield Setting("mem", "0", "computed", "all memory of the node, /dev/shm included")
    elif spec.resources.memory_per_node_bytes is not None:
        mib = -(-spec.resources.memory_per_node_bytes >> 20)
        why = "host memory of a node; pages of /dev/shm count in it (cgroup)"
        yield Setting("mem", f"{mib}M", set_by(spec, "resources.memory_per_node"), why)


def _life(spec: JobSpec) -> Iterator[Setting]:
    if spec.time_limit_s is not None:
        yield Setting("time", slurm_time(spec.time_limit_s), set_by(spec, "time_limit"))
    yield Setting(
        "signal",
        f"USR2@{_lead(spec)}",
        set_by(spec, "signal_lead"),
        "asks for a checkpoint that long before the time limit; not USR1, which NCCL catches (submitit#1697)",
    )
    requeue, why = (
        "requeue",
        "after preemption or a node failure Slurm starts the same job again; at the time limit the script asks for it",
    )
    if not spec.cluster.requeue:
        requeue, why = "no-requeue", "this site does not requeue; at the time limit the script submits a new job"
    yield Setting(requeue, None, set_by(spec, "cluster.requeue"), why)


def _lead(spec: JobSpec) -> int:
    return spec.signal_lead_s or spec.cluster.signal_lead_s


def _records(run_dir: str) -> Iterator[Setting]:
    yield Setting("output", f"{run_dir}/slurm-%j.log", "computed", "absolute, and there before the job is submitted")
    yield Setting("open-mode", "append", "computed", "a requeued job keeps its id, and would overwrite the log")
    yield Setting("propagate", "NONE", "computed", "soft limits of the login node would become the job's (memlock)")


def _extra(spec: JobSpec) -> Iterator[Setting]:
    for name, value in spec.slurm.extra.items():
        yield Setting(name, value or None, set_by(spec, f"slurm.extra.{name}"))
