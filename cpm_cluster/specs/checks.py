"""Combinations that cannot work, found before anything is submitted. Each check is one rule of the field."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from cpm_cluster.specs.fields import Reading
from cpm_cluster.specs.job import TRAINING_TASKS, Data, JobSpec
from cpm_cluster.specs.nodes import ListNode, MapNode, Node
from cpm_cluster.specs.problems import Location, Problem, did_you_mean, listed, quoted
from cpm_cluster.specs.values import format_duration, format_size
from cpm_cluster.specs.workload import INFERENCE_ENGINES, QUANTISED, TRAINING_ENGINES

HIDDEN_BY_MOUNTS = frozenset(
    "/ /bin /boot /dev /dev/shm /etc /lib /lib32 /lib64 /opt /proc /run /sbin /sys /usr /usr/bin /usr/lib /var".split()
)
CONTAINER_RUNTIMES = ("docker-rootless", "docker", "podman", "pyxis")
ROOTLESS_HOST_NETWORK_SINCE = (29, 5)  # moby#47103
OWN_ENVIRONMENT = frozenset(
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK NODE_RANK MASTER_ADDR MASTER_PORT "
    "CUDA_VISIBLE_DEVICES PYTHONPATH".split()
)
SHELLS = frozenset("sh bash dash ksh zsh".split())
SHELL_VARIABLE = re.compile(r"\$(\{[A-Z][A-Z0-9_]*\}|[A-Z][A-Z0-9_]*)")
RENDEZVOUS = re.compile(r"--(rdzv|master|node|nnodes|nproc)")  # torchrun's
OWN_SBATCH_OPTIONS = {  # and the key of the job file that means it, where there is one
    "job-name": "name",
    "time": "time_limit",
    "signal": "signal_lead",
    "nodes": "resources.nodes",
    "mem": "resources.memory_per_node",
    "cpus-per-task": "resources.cpus_per_node",
    "ntasks-per-node": "resources.processes_per_node",
    **dict.fromkeys(("gres", "gpus", "gpus-per-node", "gpus-per-task"), "resources.gpus_per_node"),
    **{name: f"slurm.{name}" for name in "partition nodelist exclude account qos reservation constraint".split()},
    **dict.fromkeys(
        "ntasks tasks-per-node ntasks-per-gpu gpus-per-socket mem-per-cpu mem-per-gpu"
        " exclusive requeue no-requeue open-mode output error export propagate array wrap parsable chdir test-only wait"
        " dependency clusters quiet".split(),
        "",
    ),
}

Finding = tuple[str, str]  # (dotted key, what is wrong)
Check = Callable[[JobSpec], Iterator[Finding]]
_CHECKS: list[tuple[Check, tuple[str, ...]]] = []


def check_job(spec: JobSpec, tree: MapNode, reading: Reading) -> None:
    """Notes what cannot work. Where a key could not be read, the checks that read it have nothing to say."""
    unread = frozenset(key for _, keys in _CHECKS for key in keys if reading.is_unread(key))
    for check, keys in _CHECKS:
        if unread.isdisjoint(keys):
            for path, what in check(spec):
                reading.problems.append(Problem(_where(tree, path), path, what))


def is_possible(spec: JobSpec) -> bool:
    """Whether no check finds anything; of a job that was changed after it was read."""
    return not any(True for check, _ in _CHECKS for _ in check(spec))


def _reads(*keys: str) -> Callable[[Check], Check]:
    """Registers a check with the keys that it reads; mappings of which any part makes sense alone are not named."""

    def register(check: Check) -> Check:
        _CHECKS.append((check, keys))
        return check

    return register


def _where(node: Node, path: str) -> Location:
    """The place of a dotted key below `node`, or of the nearest thing above it that is written."""
    if isinstance(node, MapNode):
        for name, child in node.entries.items():
            if path == name:
                return child.where
            if path.startswith((name + ".", name + "[")):
                return _where(child, path[len(name) :].removeprefix("."))
    if isinstance(node, ListNode) and (index := re.fullmatch(r"\[(\d+)\]", path)):
        return node.items[int(index[1])].where
    return node.where


def version_tuple(version: str | None) -> tuple[int, ...]:
    """(29, 5, 1) for "29.5.1"; () where nothing is known."""
    digits = ("".join(c for c in part if c.isdigit()) for part in (version or "").split("+")[0].split("."))
    return tuple(int(part) for part in digits if part)


@_reads("engine", "command")
def _command(spec: JobSpec) -> Iterator[Finding]:
    if spec.engine == "command" and not spec.command:
        yield "command", "is missing: engine command needs the program and its arguments, [python, train.py]"
    if spec.engine != "command" and spec.command:
        yield "command", f"belongs to engine command, not to {spec.engine}; remove it, or write engine: command"


@_reads("engine", "command")
def _no_shell(spec: JobSpec) -> Iterator[Finding]:
    """A line that was pasted from a shell script; words with blanks are programs of their own, as of `python -c`."""
    if spec.engine != "command" or any(posixpath.basename(word) in SHELLS for word in spec.command):
        return
    for place, word in enumerate(spec.command):
        variable = SHELL_VARIABLE.search(word)
        if variable is None or any(character.isspace() for character in word):
            continue
        instead = 'have a shell read the line: [bash, -c, "…"], or [bash, train.sh]'
        if RENDEZVOUS.match(word):
            instead = f"leave out such options, which cpm-cluster gives torchrun (PET_* variables), or {instead}"
        yield f"command[{place}]", f"no shell reads it, so {variable[0]} would stay as it is written; {instead}"


@_reads("engine", "command", "resources")
def _torchrun(spec: JobSpec) -> Iterator[Finding]:
    """Too many nodes in torchrun's own options, and it waits for them; too few, and each node trains by itself."""
    if spec.engine != "command" or posixpath.basename((*spec.command, "")[0]) != "torchrun":
        return
    line, asked = " ".join(spec.command), spec.resources
    for option, there in (("nnodes", asked.nodes), ("nproc_per_node", asked.ranks_per_node)):
        stated = re.search(rf" --{option.replace('_', '[_-]')}[= ](\d+)(?= |$)", line)
        if stated and int(stated[1]) != there:
            yield "command", f"says{stated[0]}, but the job has {there}; leave it out, since cpm-cluster tells torchrun"


@_reads("engine", "model", "workload", "resources")
def _workload(spec: JobSpec) -> Iterator[Finding]:
    work = spec.workload
    if work is None:
        return
    if spec.engine != "command":
        yield "workload", f"belongs to engine command; of {spec.engine} the keys of the job itself tell: remove it"
        return
    if spec.model is None:
        yield "model", "is missing: workload needs an architecture, a name in configs/models"
    engines = TRAINING_ENGINES if work.mode == "train" else INFERENCE_ENGINES
    if work.engine not in engines:
        yield "workload.engine", f"{work.engine} does not {work.mode}; write {listed(engines)}"
    if work.mode == "train" and work.precision in QUANTISED:
        yield "workload.precision", f"{work.precision} is for inference; write fp32, bf16 or fp16"
    if work.engine == "bmtrain" and work.zero_stage < 2:
        yield "workload.zero_stage", f"{work.zero_stage} is not a stage of BMTrain; write 2 or 3"
    if work.engine == "ddp" and (work.offload_optimizer or "workload.zero_stage" in spec.origins):
        yield "workload.engine", "ddp shards and offloads nothing; remove zero_stage and offload, or name another"
    if work.offload_param and work.engine not in ("deepspeed", "fsdp"):
        yield "workload.offload_param", f"{work.engine} keeps its weights on the GPU; remove it"


@_reads("engine", "model")
def _model_named(spec: JobSpec) -> Iterator[Finding]:
    if spec.engine != "command" and spec.model is None:
        yield "model", f"is missing: engine {spec.engine} needs an architecture, a name in configs/models"


@_reads("engine", "task", "data")
def _data_named(spec: JobSpec) -> Iterator[Finding]:
    if spec.engine == "command":
        return
    data = spec.data or Data()
    if spec.task in TRAINING_TASKS and not data.train:
        yield "data.train" if spec.data else "data", "is missing: write data: {train: path/to/rows.jsonl}"
    for use, sources in (("train", data.train), ("eval", data.eval)):
        weighted = [source.weight is not None for source in sources]
        if any(weighted) and not all(weighted):
            yield f"data.{use}", "gives a weight to some of its sources; give one to all, or to none"
    if data.format == "cpm9g" and not data.trust_pickle:
        yield (
            "data.format",
            "cpm9g is read by unpickling, which runs whatever the file says; write trust_pickle: true if it is yours,"
            " or make jsonl of it",
        )


@_reads("engine", "task", "data", "evaluation", "generation", "init_from", "method")
def _task(spec: JobSpec) -> Iterator[Finding]:
    if spec.engine == "command":
        return
    if spec.task == "evaluate" and not (spec.data and spec.data.eval) and not spec.evaluation.choices:
        yield "task", "evaluate needs data: {eval: …} for perplexity, or evaluation: {choices: …}"
    if spec.task == "generate" and spec.generation is None:
        yield "generation", "is missing: task generate needs generation: {prompts: path/to/prompts.jsonl}"
    if spec.task != "generate" and spec.generation is not None:
        yield "generation", f"belongs to task generate, not to {spec.task}; remove it, or write task: generate"
    if spec.task not in TRAINING_TASKS and spec.init_from is None:
        yield "init_from", f"is missing: task {spec.task} needs trained weights"
    if spec.task not in TRAINING_TASKS and spec.engine != "torch":
        yield "engine", f"{spec.engine} trains; for task {spec.task} write torch"
    if spec.task not in TRAINING_TASKS and spec.method is not None:
        yield (
            "method",
            f"lora is for training; for task {spec.task} fold the updates into the weights first (cpm export --merge),"
            " and name the result in init_from",
        )


@_reads("resources", "cluster")
def _resources_within_cluster(spec: JobSpec) -> Iterator[Finding]:
    asked, cluster = spec.resources, spec.cluster
    if cluster.scheduler == "local" and asked.nodes > 1:
        yield (
            "resources.nodes",
            f"{asked.nodes} nodes, but cluster {spec.cluster_name} is this machine alone;"
            " name a Slurm cluster, or a smaller profile",
        )
    elif cluster.nodes is not None and asked.nodes > cluster.nodes:
        yield "resources.nodes", f"{asked.nodes} nodes, but {spec.cluster_name} has {cluster.nodes}"
    if cluster.gpus_per_node == 0 and asked.gpus_per_node:
        yield (
            "resources.gpus_per_node",
            f"{asked.gpus_per_node} GPUs per node, but cluster {spec.cluster_name} has none;"
            " name a cluster with GPUs, or a profile without",
        )
        return  # the job is not for this cluster: its other figures do not matter
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
        yield "resources.gpu", f"{asked.gpu}, but the GPUs of {spec.cluster_name} are {cluster.gpu}; leave it out"
    if asked.shm_bytes and asked.memory_per_node_bytes and asked.shm_bytes > asked.memory_per_node_bytes:
        yield (
            "resources.shm",
            f"{format_size(asked.shm_bytes)} is more than resources.memory_per_node"
            f" ({format_size(asked.memory_per_node_bytes)}), of which /dev/shm is a part",
        )


@_reads("resources", "engine")
def _ranks(spec: JobSpec) -> Iterator[Finding]:
    asked = spec.resources
    if asked.gpus_per_node and asked.processes_per_node not in (None, asked.gpus_per_node):
        yield (
            "resources.processes_per_node",
            f"{asked.processes_per_node} ranks on {asked.gpus_per_node} GPUs; a rank has one GPU: leave it out",
        )
    if asked.gpus_per_node == 0 and spec.engine in ("bmtrain", "deepspeed"):
        yield "engine", f"{spec.engine} needs GPUs; on CPUs use engine: torch"


@_reads("slurm.partition", "resources.nodes", "time_limit", "cluster")
def _partition(spec: JobSpec) -> Iterator[Finding]:
    name, known = spec.slurm.partition, spec.cluster.partitions
    if spec.cluster.scheduler != "slurm" or not known:
        return  # Slurm has a default partition of its own
    if name is None:
        yield "slurm.partition", f"is missing; write one of {spec.cluster_name}'s: {listed(known)}"
        return
    if name not in known:
        yield (
            "slurm.partition",
            f"{quoted(name)} is no partition of {spec.cluster_name}; it has {listed(known)}{did_you_mean(name, known)}",
        )
        return
    partition = known[name]
    cluster_nodes = spec.cluster.nodes or spec.resources.nodes  # above these, the cluster has the word
    if partition.nodes is not None and partition.nodes < spec.resources.nodes <= cluster_nodes:
        yield (
            "resources.nodes",
            f"{spec.resources.nodes} nodes, but partition {name} has {partition.nodes}; ask for fewer, or name another",
        )
    if partition.max_time_s is not None and (spec.time_limit_s or 0) > partition.max_time_s:
        yield (
            "time_limit",
            f"{format_duration(spec.time_limit_s or 0)}, but partition {name} allows"
            f" {format_duration(partition.max_time_s)}; a run resumes from its checkpoint, so ask for less",
        )


@_reads("time_limit", "signal_lead", "cluster")
def _time(spec: JobSpec) -> Iterator[Finding]:
    if spec.time_limit_s is None:
        if spec.cluster.scheduler == "slurm":
            yield "time_limit", "is missing: Slurm needs one; write time_limit: 24h"
        return
    lead = spec.signal_lead_s or spec.cluster.signal_lead_s
    if spec.cluster.scheduler == "slurm" and not 10 <= lead <= 65_535:
        yield "signal_lead", f"{format_duration(lead)}, but Slurm takes 10 s to 65,535 s (18 h)"
    if lead >= spec.time_limit_s:
        yield (
            "time_limit",
            f"{format_duration(spec.time_limit_s)} is not longer than the warning before it"
            f" (signal_lead, {format_duration(lead)}): the job would be asked to stop at its start;"
            " lengthen the one or shorten the other",
        )


@_reads("slurm.nodelist", "resources.nodes")
def _node_list(spec: JobSpec) -> Iterator[Finding]:
    if spec.slurm.nodelist and (count := count_nodes(spec.slurm.nodelist)) > spec.resources.nodes:
        yield (
            "slurm.nodelist",
            f"{spec.slurm.nodelist} names {count} nodes, but resources.nodes is {spec.resources.nodes}:"
            f" Slurm would allocate them all; write nodes: {count}, or name fewer",
        )


def count_nodes(nodelist: str) -> int:
    """Nodes in a Slurm host list such as `g2001` or `g[2001-2004,2007],h1`."""
    count = 0
    for ranges in re.findall(r"[^,\[]+(?:\[([^\]]*)\])?", nodelist):
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            count += max(0, int(last) - int(first)) + 1 if last else 1
    return count


@_reads("training", "engine", "resources")
def _gpu_features(spec: JobSpec) -> Iterator[Finding]:
    gpu, training = spec.gpu, spec.training
    if gpu is None or not spec.resources.gpus_per_node or spec.engine == "command":
        return
    if training.precision == "bf16" and not gpu.has_bf16:
        bf16 = "bf16" if "training.precision" in spec.origins else "bf16 (the default)"
        yield (
            "training.precision",
            f"{bf16} needs an Ampere GPU or newer (sm_80); {gpu.product} is sm_{gpu.sm}: write fp16",
        )
    if training.attention == "flash" and gpu.sm < 80:
        yield (
            "training.attention",
            f"flash-attention 2 needs an Ampere GPU or newer (sm_80); {gpu.product} is sm_{gpu.sm}: write sdpa",
        )


@_reads("image", "engine", "training", "resources", "cluster")
def _image_fits(spec: JobSpec) -> Iterator[Finding]:
    image, gpu = spec.image, spec.gpu
    if image is None:
        return
    if gpu and image.gpu and image.sm and spec.resources.gpus_per_node and not image.runs_on(gpu.sm):
        codes = ", ".join(f"sm_{code}" for code in image.sm)
        cuda = f" (CUDA {image.cuda})" if image.cuda else ""
        yield (
            "image",
            f"{image.tag}{cuda} has no code for {gpu.product} (sm_{gpu.sm}), only for {codes}; name another image",
        )
    if spec.engine == "bmtrain" and image.bmtrain is None:
        yield "engine", f"bmtrain is not in {image.tag}; write torch, or name an image that has it"
    if spec.engine == "deepspeed" and image.deepspeed is None:
        yield "engine", f"deepspeed is not in {image.tag}; write torch, or name an image that has it"
    if spec.engine == "bmtrain" and spec.training.precision == "bf16" and version_tuple(image.bmtrain)[:1] == (0,):
        yield (
            "training.precision",
            f"BMTrain {image.bmtrain} in {image.tag} knows fp16 only (bf16 since 1.0): write fp16",
        )
    on_old_gpu = gpu is not None and gpu.sm < 80  # has been said
    if spec.engine != "command" and spec.training.attention == "flash" and not image.flash_attn and not on_old_gpu:
        yield "training.attention", f"flash-attn is not in {image.tag}; write sdpa, or auto: the best there is"
    needed, have = version_tuple(image.min_driver), version_tuple(spec.cluster.driver)
    if needed and have and have < needed and spec.resources.gpus_per_node:
        yield (
            "image",
            f"{image.tag} needs NVIDIA driver {image.min_driver} or newer; {spec.cluster_name} has"
            f" {spec.cluster.driver}; name an older image",
        )


@_reads("runtime", "image", "resources", "cluster")
def _runtime(spec: JobSpec) -> Iterator[Finding]:
    offered, asked = spec.cluster.runtimes, spec.runtime
    fitting = [name for name in offered if runtime_obstacle(spec, name) is None]
    if asked is not None and asked not in offered:
        yield "runtime", f"{asked} is not offered by {spec.cluster_name}, which has {listed(offered)}"
    elif asked is not None and asked not in fitting:
        others = f"write {listed(fitting)}" if fitting else f"no other runtime of {spec.cluster_name} can run it either"
        yield "runtime", f"{asked} cannot run this job: it {runtime_obstacle(spec, asked)}; {others}"
    elif spec.image is None and not fitting and all(name in CONTAINER_RUNTIMES for name in offered):
        what = f"is missing: {spec.cluster_name} runs jobs in containers ({listed(offered)})"
        yield "image", f"{what}; name one in configs/images"
    elif spec.image is not None and not fitting and not any(name in CONTAINER_RUNTIMES for name in offered):
        what = f"{spec.image.tag} needs a container runtime, but cluster {spec.cluster_name} has {listed(offered)}"
        yield "image", f"{what}; leave the image out, or name another cluster"
    elif not fitting:
        reasons = "; ".join(f"{name} {runtime_obstacle(spec, name)}" for name in offered)
        yield "runtime", f"no runtime of {spec.cluster_name} can run this job: {reasons}"


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
            f"has no host network in Docker {version or 'before 29.5, which this may be'}"
            " (29.5 is the first, moby#47103), so that ranks on several nodes cannot reach each other"
        )
    if runtime == "conda" and spec.cluster.runtimes[runtime].environment is None:
        return "has no environment in the cluster file"
    return None


@_reads("container", "resources.shm")
def _shared_memory(spec: JobSpec) -> Iterator[Finding]:
    shm = spec.resources.shm_bytes
    if spec.container.ipc == "host" and shm is not None:
        yield (
            "container.ipc",
            f"host takes the node's /dev/shm as it is, so that resources.shm ({format_size(shm)}, set by"
            f" {spec.origins['resources.shm']}) has no effect; write ipc: private, or shm: null",
        )


@_reads()
def _mounts(spec: JobSpec) -> Iterator[Finding]:
    places: dict[str, str] = {}
    for host, target in spec.mounts.items():
        path = f"mounts.{host}"
        inside, _, mode = target.partition(":")
        place = posixpath.normpath("/" + inside.lstrip("/"))
        if mode not in ("", "ro", "rw"):
            yield path, f"{quoted(target)} has the mode {quoted(mode)}; write :ro, or nothing"
        if any(c in host + inside for c in ',":'):
            yield path, "a path to mount may not hold a comma, a colon or a double quote"
        if ".." in PurePosixPath(host).parts or ".." in PurePosixPath(inside).parts:
            yield path, "a path to mount may not climb with '..'"
        elif place in HIDDEN_BY_MOUNTS:
            yield path, f"would hide {place} of the container; mount it somewhere else, such as /mnt/name"
        elif place in places:
            yield path, f"{place} is already the place of {places[place]}; mount it somewhere else"
        if host.startswith("~") and os.path.expanduser(host).startswith("~"):
            yield path, f"there is no home folder {host.split('/')[0]}"
        places[place] = host


@_reads()
def _environment(spec: JobSpec) -> Iterator[Finding]:
    for name in spec.env:
        if owner := _owner(name):
            yield f"env.{name}", f"is set by {owner}; remove it"
        if name in spec.secrets:
            yield f"env.{name}", "is also in secrets, whose values stay out of the job file; remove it here"
    for index, name in enumerate(spec.secrets):
        if owner := _owner(name):
            yield f"secrets[{index}]", f"{name} is set by {owner}; remove it"


def _owner(variable: str) -> str | None:
    """Who sets an environment variable that is not a job's to set."""
    if variable.startswith(("SLURM_", "SBATCH_")):
        return "Slurm"
    own = variable in OWN_ENVIRONMENT or variable.startswith("CPM_")
    return "cpm-cluster, for each rank" if own else None


@_reads()
def _slurm_extra(spec: JobSpec) -> Iterator[Finding]:
    for name in spec.slurm.extra:
        # sbatch takes the beginning of an option for the option (getopt_long(3)); an exact name comes first
        meant = sorted(own for own in OWN_SBATCH_OPTIONS if own.startswith(name))[:1]
        for own in meant:
            what = "is" if own == name else f"is short for --{own}, which is"
            instead = f"write {OWN_SBATCH_OPTIONS[own]} instead" if OWN_SBATCH_OPTIONS[own] else "remove it"
            yield f"slurm.extra.{name}", f"{what} decided by cpm-cluster; {instead}"


@_reads("model", "engine", "method")
def _model_shape(spec: JobSpec) -> Iterator[Finding]:
    model = spec.model
    if model is None:
        return
    if model.head_dim is None and model.hidden % model.heads:
        yield "model.heads", f"{model.heads} heads do not divide hidden {model.hidden}; change heads, or set head_dim"
    elif model.size_of_head % 2:
        yield "model.head_dim", f"{model.size_of_head} is odd; rotary embeddings turn pairs"
    if model.heads % model.key_value_heads:
        yield "model.kv_heads", f"{model.key_value_heads} key/value heads do not divide {model.heads} heads"
    if spec.engine in ("torch", "bmtrain") and model.block != "cpm9g":
        yield "model", f"its block layout is {model.block}; the trainer builds cpm9g: use engine: command for others"
    if spec.method and spec.method.rank > model.hidden:
        yield "method.lora.rank", f"{spec.method.rank} is more than the hidden size {model.hidden}"


@_reads("training", "engine", "resources", "data")
def _training(spec: JobSpec) -> Iterator[Finding]:
    training = spec.training
    if spec.engine == "command":
        return
    if len(training.betas) != 2:
        yield "training.betas", f"has {len(training.betas)} numbers; AdamW takes two"
    if training.warmup_steps > training.steps:
        yield "training.warmup_steps", f"{training.warmup_steps} is more than training.steps ({training.steps})"
    if spec.engine == "torch" and training.zero_stage == 1:
        yield "training.zero_stage", "1 is not a stage of the torch engine; write 0 (DDP), 2 or 3 (FSDP)"
    if spec.engine == "bmtrain" and training.zero_stage < 2:
        yield "training.zero_stage", f"{training.zero_stage} is not a stage of BMTrain; write 2 or 3"
    if spec.engine == "torch" and training.offload_optimizer:
        yield "training.offload_optimizer", "the torch engine keeps its optimizer on the GPU; use bmtrain or deepspeed"
    if spec.engine == "bmtrain" and training.offload_optimizer and training.precision == "fp32":
        yield "training.offload_optimizer", "BMTrain's AdamOffload computes in fp16 or bf16; write one, or false here"
    if training.precision == "fp16" and spec.resources.gpus_per_node == 0:
        yield "training.precision", "fp16 with a loss scale needs GPUs; on CPUs use bf16 or fp32"
    if training.eval_every and spec.data and not spec.data.eval:
        yield "data.eval", "is missing: training.eval_every asks for evaluations; name its data"
