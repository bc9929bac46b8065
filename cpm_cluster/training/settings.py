"""``trainer.json`` as frozen dataclasses. Units: lengths in tokens, rates per optimizer step."""

# The annotations are evaluated when a file is read, on Python 3.8 too: no `tuple[...]`, no `X | None`.
# ruff: noqa: UP006, UP045

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional, Tuple, Union


@dataclass(frozen=True)
class ModelSettings:
    """The dimensions of a CPM-9G style decoder; the fields are those of ``configs/models``."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    norm_eps: float
    rope_theta: float
    tied_embeddings: bool


@dataclass(frozen=True)
class FullTuning:
    """Every weight is trained."""

    kind: Literal["full"]


@dataclass(frozen=True)
class LoraTuning:
    """Low-rank updates of the target layers are trained, scaled by ``alpha / rank``; the base is frozen."""

    kind: Literal["lora"]
    rank: int
    alpha: float
    dropout: float
    targets: Tuple[str, ...]


MethodSettings = Union[FullTuning, LoraTuning]


@dataclass(frozen=True)
class SourceSettings:
    """A jsonl file, a pattern of several, or the name of a built-in corpus; ``weight`` relates to other sources."""

    path: str
    weight: Optional[float]


@dataclass(frozen=True)
class DataSettings:
    """A source is drawn as often as it is long, or as its weight says: all have one, or none has.

    Weights are shares of samples, not of tokens. Evaluation takes every sample once; its sources have no weight.
    """

    train: Tuple[SourceSettings, ...]
    eval: Tuple[SourceSettings, ...]
    format: Literal["jsonl", "cpm9g"]
    trust_pickle: bool


@dataclass(frozen=True)
class CheckpointSettings:
    """A checkpoint every ``every`` steps, of which the ``keep`` newest stay; written while training goes on."""

    every: int
    keep: int
    asynchronous: bool


@dataclass(frozen=True)
class GuardSettings:
    """What to do with a loss that is no number, or ``spike_deviations`` above the mean of ``window`` steps.

    ``limit`` steps of either kind are left out or rolled back; the one after them ends the run.
    """

    nonfinite: Literal["stop", "skip", "rollback"]
    spike: Literal["ignore", "stop", "skip", "rollback"]
    spike_deviations: float
    window: int
    limit: int


@dataclass(frozen=True)
class TrainingSettings:
    """The optimisation: ``micro_batch`` rows of ``seq_len`` tokens, ``grad_accum`` times a rank and step.

    0 turns off ``clip_grad_norm`` and ``eval_every``; otherwise the last step is evaluated, too.
    """

    seq_len: int
    micro_batch: int
    grad_accum: int
    steps: int
    lr: float
    min_lr_ratio: float
    schedule: Literal["cosine", "wsd", "linear", "noam", "constant"]
    warmup_steps: int
    weight_decay: float
    betas: Tuple[float, float]
    eps: float
    clip_grad_norm: float
    precision: Literal["fp32", "bf16", "fp16"]
    recompute: Literal["none", "full"]
    attention: Literal["auto", "flash", "varlen", "sdpa", "math"]
    zero_stage: int
    offload_optimizer: bool
    log_every: int
    eval_every: int
    checkpoint: CheckpointSettings
    guard: GuardSettings


@dataclass(frozen=True)
class EvaluationSettings:
    """Task evaluate: jsonl files of multiple-choice questions, ``shots`` of them shown with their answers."""

    choices: Tuple[str, ...]
    shots: int


@dataclass(frozen=True)
class GenerationSettings:
    """Task generate: a jsonl file of prompts, ``batch`` at a time and rank; temperature 0 takes the best."""

    prompts: str
    batch: int
    max_tokens: int
    temperature: float
    top_p: float


@dataclass(frozen=True)
class WorkSettings:
    """FLOPs of the model for a token (forward and backward, no recompute), and a rank's peak FLOP/s, where known."""

    flops_per_token: Optional[float]
    peak_flops_per_rank: Optional[float]


@dataclass(frozen=True)
class SampleSettings:
    """Texts to continue before the first and after the last step, each as written, after ``<s>``."""

    prompts: Tuple[str, ...]
    max_tokens: int
    temperature: float


@dataclass(frozen=True)
class Settings:
    """All of ``trainer.json``; ``adapter`` holds the LoRA updates to begin with (the job's method.lora.init_from)."""

    format: int
    output_dir: str
    expected_world_size: int
    seed: int
    deterministic: bool
    engine: str
    task: Literal["pretrain", "finetune", "evaluate", "generate"]
    model: ModelSettings
    init_from: Optional[str]
    tokenizer: str
    method: MethodSettings
    adapter: Optional[str]
    data: DataSettings
    training: TrainingSettings
    evaluation: EvaluationSettings
    generation: Optional[GenerationSettings]
    samples: SampleSettings
    work: WorkSettings
