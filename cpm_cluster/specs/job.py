"""The job file: what a person asks for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from cpm_cluster.specs.cluster import ABSOLUTE_PATH, NODE_LIST, RUNTIMES, SLURM_NAME, Cluster
from cpm_cluster.specs.fields import (
    DURATION,
    Boolean,
    Choice,
    Integer,
    ListOf,
    MapOf,
    Number,
    Reading,
    Schema,
    Section,
    Text,
    key,
)
from cpm_cluster.specs.gpu import Gpu
from cpm_cluster.specs.image import ENV_NAME, Image
from cpm_cluster.specs.model import LORA_TARGETS, Model
from cpm_cluster.specs.nodes import MapNode, Node, ScalarNode, kind
from cpm_cluster.specs.problems import Location
from cpm_cluster.specs.profile import Resources
from cpm_cluster.specs.workload import Workload

ENGINES = ("bmtrain", "torch", "deepspeed", "command")
ENGINES_ELSEWHERE = (("libcpm", "command"), ("ddp", "torch"), ("fsdp", "torch"), ("pytorch", "torch"))
TASKS = ("pretrain", "finetune", "evaluate", "generate")
TASKS_ELSEWHERE = (("inference", "generate"), ("infer", "generate"), ("sft", "finetune"), ("train", "finetune"))
TRAINING_TASKS = ("pretrain", "finetune")
CONFIG_NAME = Text(r"[A-Za-z0-9./~][A-Za-z0-9._:/~+-]*", "a name in configs, or the path of a .yaml file")
SOURCES = "a path, {path: …, weight: …}, or a list of them"
DATA_SOURCE = Text(r"[^\s-].*", "a path, or builtin:python-reference")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters on a frozen model (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = key(Integer(1, 100_000), "rank r of the adapters", 8)
    alpha: float = key(
        Number(0, 1e6, above_minimum=True), "scale: the adapter's output is multiplied by alpha / rank", 16.0
    )
    dropout: float = key(Number(0, 0.99), "dropout before the adapters", 0.0)
    targets: tuple[str, ...] = key(
        ListOf(Choice(LORA_TARGETS), minimum=1), "layers that get an adapter", ("project_q", "project_v")
    )
    init_from: str | None = key(
        Text(r"[^\s-].*", "a path"),
        "adapter to begin with, of this rank, alpha and targets: a run, PEFT's folder, or a -delta.pt of CPM-9G;"
        " left out: new",
        None,
    )


class MethodField(NamedTuple):
    """`full`, `lora`, or `{lora: {rank: …}}`; read as a Lora, or None for full tuning."""

    def read(self, node: Node, path: str, reading: Reading) -> Lora | None:
        if isinstance(node, ScalarNode) and not node.is_null:
            return Lora() if Choice(("full", "lora")).read(node, path, reading) == "lora" else None
        if isinstance(node, MapNode) and list(node.entries) == ["lora"]:
            lora: Lora = Section(Lora).read(node.entries["lora"], f"{path}.lora", reading)
            return lora
        given = "has keys besides lora" if isinstance(node, MapNode) and "lora" in node.entries else f"is {kind(node)}"
        raise reading.refuse(node.where, path, f"{given}; write full, lora, or {{lora: {{rank: 64, alpha: 64}}}}")

    def schema(self) -> Schema:
        adapters = {"type": "object", "properties": {"lora": Section(Lora).schema()}, "required": ["lora"]}
        return {"anyOf": [{"enum": ["full", "lora"]}, adapters | {"additionalProperties": False}]}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A part of the data, and how often it is drawn."""

    path: str = key(DATA_SOURCE, "a .jsonl file, a pattern such as data/*.jsonl, or builtin:python-reference")
    weight: float | None = key(
        Number(1e-6, 1e6), "share of the samples, relative to the other sources; give one to all or none", None
    )


class SourceField(NamedTuple):
    """A path, or `{path: …, weight: …}`; read as a Source."""

    def read(self, node: Node, path: str, reading: Reading) -> Source:
        if isinstance(node, MapNode):
            source: Source = Section(Source).read(node, path, reading)
            return source
        return Source(path=DATA_SOURCE.read(node, path, reading))

    def schema(self) -> Schema:
        return {"anyOf": [DATA_SOURCE.schema(), Section(Source).schema()]}


class Reference(NamedTuple):
    """The name of a config, the path of one, or a mapping: the whole thing, or `{base: NAME, changed: keys}`.

    Read as it stands; specs/compose.py looks it up.
    """

    spec: type[Any]

    def read(self, node: Node, path: str, reading: Reading) -> Node:
        if isinstance(node, MapNode):
            known = replace(node, entries={k: v for k, v in node.entries.items() if k != "base"})
            Section(self.spec).values(known, path, reading)
            if "base" in node.entries:
                CONFIG_NAME.read(node.entries["base"], f"{path}.base", reading)
        else:
            CONFIG_NAME.read(node, path, reading)
        return node

    def schema(self) -> Schema:
        inline = Section(self.spec).schema()
        inline["properties"] = {"base": CONFIG_NAME.schema()} | inline["properties"]
        del inline["required"]
        return {"anyOf": [CONFIG_NAME.schema(), inline]}


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """When to save, and how many to keep."""

    every: int = key(Integer(1), "steps between checkpoints", 200)
    keep: int = key(Integer(1, 10_000), "newest checkpoints that are kept", 2)
    asynchronous: bool = key(Boolean(), "write in the background while training goes on", True)


@dataclass(frozen=True, kw_only=True)
class LossGuard:
    """What to do when the loss is no number, or jumps."""

    nonfinite: str = key(
        Choice(("stop", "skip", "rollback")),
        "NaN or infinity: end the run, leave the step out, or go back to the last checkpoint and past these data",
        "stop",
    )
    spike: str = key(Choice(("ignore", "stop", "skip", "rollback")), "a sudden jump of the loss: the same", "ignore")
    spike_deviations: float = key(
        Number(1, 1e6), "a spike is this many standard deviations above the mean of the window", 6.0
    )
    window: int = key(Integer(8, 100_000), "steps that the mean and the deviation are taken over", 64)
    limit: int = key(Integer(1, 10_000), "steps left out or rolled back before the run ends all the same", 10)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Hyper-parameters; batch of one step = ranks × micro_batch × grad_accum sequences."""

    seq_len: int = key(Integer(1, 1 << 24), "tokens in a packed sequence", 2048)
    micro_batch: int = key(Integer(1, 1 << 20), "sequences per rank and forward pass", 1)
    grad_accum: int = key(Integer(1, 1 << 20), "gradient accumulation: micro batches per optimizer step", 1)
    steps: int = key(Integer(1), "optimizer steps", 1000)
    lr: float = key(Number(above_minimum=True, maximum=100), "peak learning rate", 1e-5)
    min_lr_ratio: float = key(Number(0, 1), "floor of the decay, as a part of lr", 0.1)
    schedule: str = key(Choice(("cosine", "wsd", "linear", "noam", "constant")), "learning-rate schedule", "cosine")
    warmup_steps: int = key(Integer(), "steps of linear warm-up", 0)
    weight_decay: float = key(Number(0, 10), "decoupled weight decay of AdamW", 0.1)
    betas: tuple[float, float] = key(ListOf(Number(0, 0.999999999), minimum=2), "betas of AdamW", (0.9, 0.95))
    eps: float = key(Number(1e-20, 1), "epsilon of AdamW", 1e-8)  # with less, gradients whose square fp32 loses explode
    clip_grad_norm: float = key(Number(0, 1e9), "clip the global gradient norm to this; 0 = no clipping", 1.0)
    precision: str = key(Choice(("fp32", "bf16", "fp16")), "compute precision", "bf16")
    recompute: str = key(Choice(("none", "full")), "activation checkpointing", "none")
    attention: str = key(
        Choice(("auto", "flash", "varlen", "sdpa", "math")),
        "attention kernel: flash-attn, torch's varlen_attn, torch's SDPA, written out; auto: the best there is",
        "auto",
    )
    zero_stage: int = key(Integer(0, 3), "what is sharded: 0 nothing (DDP), 1 states, 2 + gradients, 3 + weights", 3)
    offload_optimizer: bool = key(Boolean(), "optimizer states and step on the CPU", False)
    log_every: int = key(Integer(1), "steps between logged metrics", 1)
    eval_every: int = key(Integer(), "steps between evaluations; 0 = none", 0)
    checkpoint: Checkpointing = key(Section(Checkpointing), "saving", factory=Checkpointing)
    guard: LossGuard = key(Section(LossGuard), "NaN and loss spikes", factory=LossGuard)


@dataclass(frozen=True, kw_only=True)
class Data:
    """jsonl files of {input, output} rows, alone or in a weighted mixture."""

    train: tuple[Source, ...] = key(ListOf(SourceField(), or_one=True, expected=SOURCES), "training data", ())
    eval: tuple[Source, ...] = key(ListOf(SourceField(), or_one=True, expected=SOURCES), "evaluation data", ())
    format: str = key(
        Choice(("jsonl", "cpm9g")), "jsonl, or the folders that CPM-9G's data_binarize.py writes", "jsonl"
    )
    trust_pickle: bool = key(
        Boolean(), "read CPM-9G's binary data, which are pickles: whoever wrote them can run code in your job", False
    )


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Text generated before the first and after the last step."""

    prompts: tuple[str, ...] = key(ListOf(Text(multiline=True)), "what to continue", ())
    max_tokens: int = key(Integer(1, 100_000), "tokens to generate", 64)
    temperature: float = key(Number(0, 100), "0 = greedy", 0.8)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Task evaluate: perplexity over `data.eval`, and multiple-choice questions."""

    choices: tuple[str, ...] = key(
        ListOf(Text(r"[^\s-].*", "a path"), or_one=True, expected="a path, or a list of paths"),
        'jsonl files of {"question": …, "choices": [a, b], "answer": 0}',
        (),
    )
    shots: int = key(Integer(0, 1000), "questions with their answers that are shown before each (few-shot)", 0)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Task generate: prompts in, texts out."""

    prompts: str = key(Text(r"[^\s-].*", "a path"), 'jsonl file of {"input": …}; the texts: generated.jsonl in the run')
    batch: int = key(Integer(1, 100_000), "prompts at a time and rank", 8)
    max_tokens: int = key(Integer(1, 1 << 24), "tokens to generate for each", 256)
    temperature: float = key(Number(0, 100), "0 = greedy", 0.0)
    top_p: float = key(
        Number(0, 1, above_minimum=True), "nucleus sampling: the likeliest tokens that hold this much", 0.95
    )


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What only Slurm needs to know."""

    partition: str | None = key(SLURM_NAME, "partition; default: the cluster's", None)
    nodelist: str | None = key(NODE_LIST, "run on these nodes; left out: Slurm chooses", None)
    exclude: str | None = key(NODE_LIST, "never on these nodes", None)
    account: str | None = key(SLURM_NAME, "account to charge", None)
    qos: str | None = key(SLURM_NAME, "quality of service", None)
    reservation: str | None = key(SLURM_NAME, "reservation", None)
    constraint: str | None = key(Text(r"[A-Za-z0-9_.&|*\[\]()-]+", "node features"), "node features", None)
    extra: dict[str, str] = key(
        MapOf(
            Text(r"[A-Za-z0-9_.,:/@%=+\[\]-]*", "text without spaces or quotes"),
            r"[a-z][a-z-]*",
            "a long sbatch option without its dashes",
        ),
        "further sbatch options, without the dashes: {comment: x, spread-job: ''}",
        factory=dict,
    )


@dataclass(frozen=True, kw_only=True)
class Container:
    """How the container is set up."""

    ipc: str = key(Choice(("private", "host")), "host: the node's /dev/shm, whose size is the node's", "private")
    workdir: str | None = key(ABSOLUTE_PATH, "working directory inside; default: the snapshot of your code", None)


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What the user asked for, fully composed: job ← profile ← cluster defaults ← --set.

    `model`, `image`, `cluster`, `gpu` are looked up; `origins` says for each dotted key who set it and where;
    what the cluster file says is below `cluster.`
    """

    name: str = key(
        Text(r"[A-Za-z0-9][A-Za-z0-9._-]*", "a name of letters, digits, . _ -", max_length=64),
        "name of the job and of its runs",
    )
    description: str = key(Text(multiline=True), "what it is, for people", "")
    model: Model | None = key(Reference(Model), "model: a name in configs/models, a path, or a mapping", None)
    method: Lora | None = key(MethodField(), "full, lora, or {lora: {rank: …}}", None)
    init_from: str | None = key(
        Text(r"[^\s-].*", "a path"),
        "weights to start from: CPM-9G's .pt, or a folder of Hugging Face's Llama layout; left out: random",
        None,
    )
    tokenizer: str = key(Text(r"[^\s-].*", "bytes, a name in configs/tokenizers, or a path"), "tokenizer", "bytes")
    profile: str | None = key(CONFIG_NAME, "resource profile", None)
    resources: Resources = key(Section(Resources), "GPUs, nodes, memory; write them here, or name a profile with them")
    cluster: Cluster = key(CONFIG_NAME, "cluster; left out: detected", None)
    image: Image | None = key(Reference(Image), "container image", None)
    runtime: str | None = key(
        Choice(RUNTIMES), "container runtime; left out: the first of the cluster's that fits", None
    )
    engine: str = key(
        Choice(ENGINES, ENGINES_ELSEWHERE), "bmtrain, torch, deepspeed, or command (any program)", "torch"
    )
    command: tuple[str, ...] = key(
        ListOf(
            Text(multiline=True),
            minimum=1,
            expected="the program and its arguments as a list, [python, train.py]; no shell reads it, but one does in"
            ' [bash, -c, "a line with $VARIABLES"]',
        ),
        "engine command: program and arguments, a list, never a shell line",
        (),
    )
    workload: Workload | None = key(
        Section(Workload), "engine command: what the program computes, for the planner; left out: not judged", None
    )
    task: str = key(
        Choice(TASKS, TASKS_ELSEWHERE),
        "pretrain (plain text, long documents are split), finetune (prompts and answers), evaluate, generate",
        "finetune",
    )
    code: str | None = key(
        Text(r"[^\s-].*", "the path of a folder"),
        "folder that is copied into the run and is the working directory; default: the git checkout of the job file,"
        " or the job file's folder",
        None,
    )
    data: Data | None = key(Section(Data, "a mapping, {train: path/to/rows.jsonl}"), "what to train on", None)
    training: Training = key(Section(Training), "hyper-parameters", factory=Training)
    samples: Samples = key(Section(Samples), "generated samples", factory=Samples)
    evaluation: Evaluation = key(Section(Evaluation), "task evaluate", factory=Evaluation)
    generation: Generation | None = key(Section(Generation), "task generate", None)
    # NumPy takes 32 bits, and BMTrain hands it the seed
    seed: int = key(Integer(0, 2**32 - 1), "seed of everything random", 1234)
    deterministic: bool = key(Boolean(), "bit-identical repeats, at some cost in speed", False)
    time_limit_s: int | None = key(DURATION, "time limit; default: the profile's or cluster's", None)
    mounts: dict[str, str] = key(
        MapOf(ABSOLUTE_PATH, r"[/~].*", "an absolute host path", "a mapping, {/on/the/host: /in/the/container}"),
        "host path: container path, with :ro to protect",
        factory=dict,
    )
    env: dict[str, str] = key(
        MapOf(Text(), ENV_NAME, "a variable name (letters, digits, _)", "a mapping, {NAME: value}"),
        "environment of the training",
        factory=dict,
    )
    secrets: tuple[str, ...] = key(
        ListOf(Text(ENV_NAME, "a variable name (letters, digits, _)")),
        "names of variables that stay out of the record; values: ~/.config/cpm-cluster/secrets.env (mode 0600)",
        (),
    )
    slurm: Slurm = key(Section(Slurm), "Slurm only", factory=Slurm)
    container: Container = key(Section(Container), "container set-up", factory=Container)
    signal_lead_s: int | None = key(DURATION, "warning before the time limit; default: the cluster's", None)

    gpu: Gpu | None = None
    model_name: str | None = None
    cluster_name: str = "local"
    origins: dict[str, Origin] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """Who set a value (cluster, profile, job or --set), where, and as which text."""

    set_by: str
    where: Location | None = None
    text: str = ""

    def __str__(self) -> str:
        return f"{self.set_by} ({self.where})" if self.where and self.where.line else self.set_by
