"""Combinations that cannot work, found before anything is submitted. Each check is one rule of the field."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.nccl import lint_environment
from cpm_cluster.specs.nodes import MapNode, Node
from cpm_cluster.specs.problems import Location, Problem, did_you_mean, listed, quoted
from cpm_cluster.specs.values import format_duration, format_size

CONTAINER_RUNTIMES = ("docker-rootless", "docker", "podman", "pyxis")
ROOTLESS_HOST_NETWORK_SINCE = (29, 5)  # moby#47103
OWN_ENVIRONMENT = frozenset(
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK NODE_RANK MASTER_ADDR MASTER_PORT "
    "CUDA_VISIBLE_DEVICES PYTHONPATH".split()
)
OWN_SBATCH_OPTIONS = frozenset(
    "job-name partition nodelist exclude account qos reservation constraint nodes ntasks ntasks-per-node "
    "cpus-per-task gres gpus gpus-per-node gpus-per-task mem mem-per-cpu exclusive requeue no-requeue open-mode signal "
    "output error time export array wrap parsable chdir test-only wait dependency".split()
)

Finding = tuple[str, str]  # (dotted key, what is wrong)


def check_job(spec: JobSpec, tree: MapNode, problems: list[Problem]) -> JobSpec:
    """The job with its warnings; what cannot work is added to `problems`."""
    for check in CHECKS:
        for path, what in check(spec):
            problems.append(Problem(_where(tree, path), path, what))
    return replace(spec, warnings=spec.warnings + tuple(lint_environment(spec)))


def _where(tree: MapNode, path: str) -> Location:
    """The place of a dotted key, or of the nearest thing above it that is written."""
    node: Node = tree
    for part in path.split("."):
        if not isinstance(node, MapNode) or part not in node.entries:
            break
        node = node.entries[part]
    return node.where


def version_tuple(version: str | None) -> tuple[int, ...]:
    """(29, 5, 1) for "29.5.1"; () where nothing is known."""
    digits = ("".join(c for c in part if c.isdigit()) for part in (version or "").split("+")[0].split("."))
    return tuple(int(part) for part in digits if part)


def _engine_needs(spec: JobSpec) -> Iterator[Finding]:
    if spec.engine == "command":
        if not spec.command:
            yield "command", "is missing: engine command needs the program and its arguments, [python, train.py]"
        return
    if spec.command:
        yield "command", f"belongs to engine command, not to {spec.engine}; remove it, or write engine: command"
    if spec.model is None and "model" not in spec.origins and "model.base" not in spec.origins:
        yield "model", f"is missing: engine {spec.engine} needs an architecture, a name in configs/models"
    if spec.data is None:
        yield "data", "is missing: write data: {train: path/to/rows.jsonl}"


def _resources_within_cluster(spec: JobSpec) -> Iterator[Finding]:
    asked, cluster = spec.resources, spec.cluster
    if cluster.nodes is not None and asked.nodes > cluster.nodes:
        yield "resources.nodes", f"{asked.nodes} nodes, but {spec.cluster_name} has {cluster.nodes}"
    if cluster.gpus_per_node is not None and asked.gpus_per_node > cluster.gpus_per_node:
        yield (
            "resources.gpus_per_node",
            f"{asked.gpus_per_node} GPUs per node, but a node of {spec.cluster_name} has {cluster.gpus_per_node};"
            " use more nodes",
        )
    if cluster.cpus_per_node is not None and (asked.cpus_per_node or 0) > cluster.cpus_per_node:
        yield (
            "resources.cpus_per_node",
            f"{asked.cpus_per_node} CPUs, but a node of {spec.cluster_name} has {cluster.cpus_per_node}",
        )
    limit = cluster.memory_per_node_bytes
    if limit is not None and (asked.memory_per_node_bytes or 0) > limit:
        yield (
            "resources.memory_per_node",
            f"{format_size(asked.memory_per_node_bytes or 0)}, but a node of {spec.cluster_name} has"
            f" {format_size(limit)}",
        )
    if asked.gpu and cluster.gpu and asked.gpu != cluster.gpu:
        yield "resources.gpu", f"{asked.gpu}, but the GPUs of {spec.cluster_name} are {cluster.gpu}"
    if asked.shm_bytes and asked.memory_per_node_bytes and asked.shm_bytes > asked.memory_per_node_bytes:
        yield "resources.shm", "is larger than resources.memory_per_node, and its pages count in it (cgroup)"


def _ranks(spec: JobSpec) -> Iterator[Finding]:
    asked = spec.resources
    if asked.gpus_per_node and asked.processes_per_node not in (None, asked.gpus_per_node):
        yield (
            "resources.processes_per_node",
            f"{asked.processes_per_node} ranks on {asked.gpus_per_node} GPUs; a rank has one GPU: leave it out",
        )
    if asked.gpus_per_node == 0 and spec.engine in ("bmtrain", "deepspeed"):
        yield "engine", f"{spec.engine} needs GPUs; on CPUs use engine: torch"


def _partition(spec: JobSpec) -> Iterator[Finding]:
    name, known = spec.slurm.partition, spec.cluster.partitions
    if spec.cluster.scheduler != "slurm":
        return
    if name is None:
        yield "slurm.partition", f"is missing: {spec.cluster_name} has no default partition; write {listed(known)}"
        return
    if not known:
        return
    if name not in known:
        yield (
            "slurm.partition",
            f"{quoted(name)} is no partition of {spec.cluster_name}; it has {listed(known)}{did_you_mean(name, known)}",
        )
        return
    partition = known[name]
    if partition.nodes is not None and spec.resources.nodes > partition.nodes:
        yield "resources.nodes", f"{spec.resources.nodes} nodes, but partition {name} has {partition.nodes}"
    if partition.max_time_s is not None and (spec.time_limit_s or 0) > partition.max_time_s:
        yield (
            "time_limit",
            f"{format_duration(spec.time_limit_s or 0)}, but partition {name} allows"
            f" {format_duration(partition.max_time_s)}; a run resumes from its checkpoint, so ask for less",
        )


def _time(spec: JobSpec) -> Iterator[Finding]:
    if spec.time_limit_s is None:
        if spec.cluster.scheduler == "slurm":
            yield "time_limit", "is missing: Slurm needs one; write time_limit: 24h"
        return
    lead = spec.signal_lead_s or spec.cluster.signal_lead_s
    if spec.cluster.scheduler == "slurm" and not 10 <= lead <= 65_535:
        yield "signal_lead", f"{format_duration(lead)}; Slurm takes 10 s to 65535 s (man sbatch, --signal)"
    if spec.cluster.scheduler == "slurm" and lead >= spec.time_limit_s:
        yield (
            "time_limit",
            f"{format_duration(spec.time_limit_s)} is not longer than the warning before it"
            f" (signal_lead, {format_duration(lead)}): the job would be asked to stop at its start",
        )


def _node_list(spec: JobSpec) -> Iterator[Finding]:
    if spec.slurm.nodelist and (count := count_nodes(spec.slurm.nodelist)) > spec.resources.nodes:
        yield (
            "slurm.nodelist",
            f"{spec.slurm.nodelist} names {count} nodes, but resources.nodes is {spec.resources.nodes}:"
            " Slurm would allocate them all",
        )


def count_nodes(nodelist: str) -> int:
    """Nodes in a Slurm host list such as `g2001` or `g[2001-2004,2007],h1`."""
    count, inside = 0, False
    for part in nodelist.replace("[", "[,").replace("]", ",]").split(","):
        if part.endswith("["):
            inside = True
        elif part == "]" or (inside and part.startswith("]")):
            inside = False
        elif inside and "-" in part:
            first, _, last = part.partition("-")
            count += max(0, int(last or 0) - int(first or 0) + 1)
        elif part:
            count += 1
    return count


def _gpu_features(spec: JobSpec) -> Iterator[Finding]:
    gpu, training = spec.gpu, spec.training
    if gpu is None:
        return
    if training.precision == "bf16" and not gpu.has_bf16:
        yield "training.precision", f"bf16 needs an Ampere GPU or newer (sm_80); {gpu.product} is sm_{gpu.sm}: use fp16"
    if training.attention == "flash" and gpu.sm < 80:
        yield (
            "training.attention",
            f"flash-attention 2 needs an Ampere GPU or newer (sm_80); {gpu.product} is sm_{gpu.sm}: use sdpa",
        )


def _image_fits(spec: JobSpec) -> Iterator[Finding]:
    image, gpu = spec.image, spec.gpu
    if image is None:
        return
    if gpu and image.gpu and image.sm and spec.resources.gpus_per_node and not image.runs_on(gpu.sm):
        codes = ", ".join(f"sm_{code}" for code in image.sm)
        yield (
            "image",
            f"{image.tag} (CUDA {image.cuda}) has no code for {gpu.product} (sm_{gpu.sm}), only {codes};"
            " use a newer image",
        )
    if spec.engine == "bmtrain" and image.bmtrain is None:
        yield "engine", f"bmtrain is not in {image.tag}"
    if spec.engine == "deepspeed" and image.deepspeed is None:
        yield "engine", f"deepspeed is not in {image.tag}"
    if spec.engine == "bmtrain" and spec.training.precision == "bf16" and version_tuple(image.bmtrain)[:1] == (0,):
        yield "training.precision", f"BMTrain {image.bmtrain} in {image.tag} knows fp16 only (bf16 since 1.0): use fp16"
    if spec.training.attention == "flash" and image.flash_attn is None:
        yield "training.attention", f"flash-attn is not in {image.tag}"
    needed, have = version_tuple(image.min_driver), version_tuple(spec.cluster.driver)
    if needed and have and have < needed and spec.resources.gpus_per_node:
        yield (
            "image",
            f"{image.tag} needs NVIDIA driver {image.min_driver} or newer; {spec.cluster_name} has"
            f" {spec.cluster.driver}",
        )


def _runtime(spec: JobSpec) -> Iterator[Finding]:
    offered = spec.cluster.runtimes
    if spec.runtime is not None and spec.runtime not in offered:
        yield "runtime", f"{spec.runtime} is not offered by {spec.cluster_name}, which has {listed(offered)}"
        return
    usable = [name for name in ([spec.runtime] if spec.runtime else offered) if runtime_obstacle(spec, name) is None]
    if not usable:
        reasons = "; ".join(f"{n}: {runtime_obstacle(spec, n)}" for n in ([spec.runtime] if spec.runtime else offered))
        others = [n for n in offered if runtime_obstacle(spec, n) is None]
        yield "runtime", f"{reasons}; {spec.cluster_name} offers for this job: {listed(others)}"


def runtime_obstacle(spec: JobSpec, runtime: str) -> str | None:
    """Why this job cannot use a runtime of its cluster; None where it can."""
    if runtime in CONTAINER_RUNTIMES and spec.image is None:
        return "needs an image"
    if runtime not in CONTAINER_RUNTIMES and spec.image is not None:
        return f"cannot run the image {spec.image.tag}"
    version = spec.cluster.runtimes[runtime].version
    old_docker = version_tuple(version)[:2] < ROOTLESS_HOST_NETWORK_SINCE
    if runtime == "docker-rootless" and spec.resources.nodes > 1 and old_docker:
        return (
            f"rootless Docker {version or '(version unknown)'} has no host network"
            " (29.5 is the first, moby#47103), so ranks on several nodes cannot reach each other"
        )
    if runtime == "conda" and spec.cluster.runtimes[runtime].environment is None:
        return "the cluster file names no environment"
    return None


def _shared_memory(spec: JobSpec) -> Iterator[Finding]:
    if spec.container.ipc == "host" and "resources.shm" in spec.origins:
        yield (
            "container.ipc",
            "host takes the node's /dev/shm, to which resources.shm does not apply; keep one of the two",
        )


def _mounts(spec: JobSpec) -> Iterator[Finding]:
    targets: dict[str, str] = {}
    for host, target in spec.mounts.items():
        path = f"mounts.{host}"
        inside, _, mode = target.partition(":")
        if mode not in ("", "ro", "rw"):
            yield path, f"{quoted(target)} has the mode {quoted(mode)}; write :ro or nothing"
        if any(c in host + inside for c in ',"\n\r\t:'):
            yield path, "a path to mount may not hold a comma, a colon, a quote or a line break"
        if ".." in PurePosixPath(host).parts or ".." in PurePosixPath(inside).parts:
            yield path, "a path to mount may not climb with '..'"
        if str(PurePosixPath(inside)) in ("/", "/dev", "/dev/shm", "/proc", "/sys", "/usr", "/bin", "/lib", "/etc"):
            yield path, f"would hide {inside} of the container"
        if inside in targets:
            yield path, f"{inside} is already the place of {targets[inside]}"
        targets[inside] = host


def _environment(spec: JobSpec) -> Iterator[Finding]:
    for name in spec.env:
        if name in OWN_ENVIRONMENT or name.startswith(("SLURM_", "SBATCH_", "CPM_")):
            yield f"env.{name}", "is set by cpm-cluster for each rank; remove it"
        if name in spec.secrets:
            yield f"env.{name}", "is also in secrets; a secret's value stays out of the job file"
    for name in spec.secrets:
        if name in OWN_ENVIRONMENT or name.startswith(("SLURM_", "CPM_")):
            yield "secrets", f"{name} is set by cpm-cluster; remove it"


def _slurm_extra(spec: JobSpec) -> Iterator[Finding]:
    for name in spec.slurm.extra:
        if name in OWN_SBATCH_OPTIONS:
            yield f"slurm.extra.{name}", "is decided by cpm-cluster; use the key of the job file for it"


def _model_shape(spec: JobSpec) -> Iterator[Finding]:
    model = spec.model
    if model is None:
        return
    if model.head_dim is None and model.hidden % model.heads:
        yield "model.heads", f"{model.heads} heads do not divide hidden {model.hidden}; set heads, or head_dim"
    if model.heads % model.key_value_heads:
        yield "model.kv_heads", f"{model.key_value_heads} key/value heads do not divide {model.heads} heads"
    if model.size_of_head % 2:
        yield "model.head_dim", f"{model.size_of_head} is odd; rotary embeddings turn pairs"
    if spec.engine in ("torch", "bmtrain") and model.block != "cpm9g":
        yield "model", f"its block layout is {model.block}; the trainer builds cpm9g: use engine: command for others"
    if spec.method and spec.method.rank > model.hidden:
        yield "method.lora.rank", f"{spec.method.rank} is more than the hidden size {model.hidden}"


def _training(spec: JobSpec) -> Iterator[Finding]:
    training = spec.training
    if len(training.betas) != 2:
        yield "training.betas", f"has {len(training.betas)} numbers; AdamW takes two"
    if training.warmup_steps > training.steps:
        yield "training.warmup_steps", f"{training.warmup_steps} is more than training.steps ({training.steps})"
    if spec.engine == "torch" and training.zero_stage == 1:
        yield "training.zero_stage", "1 is not a stage of the torch engine; write 0 (DDP), 2 or 3 (FSDP)"
    if spec.engine == "bmtrain" and training.zero_stage < 2:
        yield "training.zero_stage", "BMTrain shards by ZeRO 2 or 3"
    if spec.engine == "torch" and training.offload_optimizer:
        yield "training.offload_optimizer", "the torch engine keeps its optimizer on the GPU; use bmtrain or deepspeed"
    if training.precision == "fp16" and spec.resources.gpus_per_node == 0:
        yield "training.precision", "fp16 with a loss scale needs GPUs; on CPUs use bf16 or fp32"
    if training.eval_every and spec.data and not spec.data.eval:
        yield "data.eval", "is missing: training.eval_every asks for evaluations; name its data"


def _local(spec: JobSpec) -> Iterator[Finding]:
    if spec.cluster.scheduler == "local" and spec.resources.nodes > 1:
        yield (
            "resources.nodes",
            f"{spec.resources.nodes} nodes, but cluster {spec.cluster_name} is this machine alone;"
            " name a Slurm cluster, or a smaller profile",
        )


CHECKS: tuple[Callable[[JobSpec], Iterator[Finding]], ...] = (
    _engine_needs,
    _resources_within_cluster,
    _ranks,
    _partition,
    _time,
    _node_list,
    _gpu_features,
    _image_fits,
    _runtime,
    _shared_memory,
    _mounts,
    _environment,
    _slurm_extra,
    _model_shape,
    _training,
    _local,
)
