"""From a composed job to the Setup that the models of memory and time read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cpm_cluster.planner.setup import Engine, Kind, Recompute, Setup, Shape
from cpm_cluster.specs.image import Image
from cpm_cluster.specs.job import TRAINING_TASKS, JobSpec
from cpm_cluster.specs.model import Model
from cpm_cluster.specs.values import version_tuple
from cpm_cluster.specs.workload import Workload

GB = 10**9
CPU = "cpu"  # in place of a GPU's name
TRAINING_ENGINES: dict[str, Engine] = {"bmtrain": "bmtrain", "deepspeed": "deepspeed", "fsdp": "fsdp", "ddp": "ddp"}
FLASH_ATTENTION_2_SM = 80  # flash-attn 2 needs Ampere
FUSED_ATTENTION_TORCH = (2, 0)  # scaled_dot_product_attention
VARLEN_TORCH = (2, 10)  # torch.nn.attention.varlen
# Names of the adapted layers by their role; w_0 is the gate (model/decoder.py), and the only way up without one.
ADAPTED = {
    "project_q": "q",
    "project_k": "k",
    "project_v": "v",
    "attention_out": "o",
    "w_0": "gate",
    "w_1": "up",
    "w_out": "down",
}


def job_setup(spec: JobSpec) -> Setup | None:
    """None where nothing is known of what computes: engine command without a workload, or no model."""
    if spec.model is None:
        return None
    if spec.engine == "command":
        return _described(spec, spec.model, spec.workload) if spec.workload else None
    training, resources = spec.training, spec.resources
    engine, stage = _engine(spec)
    setup = Setup(
        shape=shape_of(spec.model),
        mode="lora" if spec.method else "full",
        lora_rank=spec.method.rank if spec.method else 0,
        lora_targets=tuple(_targets(spec)),
        engine=engine,
        engine_version=_version(spec, spec.engine),
        zero_stage=stage,
        offload_optimizer=training.offload_optimizer,
        offload_param=False,  # no engine of ours does it
        # BMTrain pins what AdamOffload keeps on the host (optim/adam_offload.py); DeepSpeed's default is not to.
        pin_memory=spec.engine == "bmtrain",
        # BMTrain shards a parameter as it is made, DeepSpeed within zero.Init, FSDP2 one layer after another.
        zero_init=True,
        frozen_first=spec.engine == "bmtrain",  # training/engines/bmtrain_layers.py
        bucket_elements=0,  # DeepSpeed's defaults: jobs have no keys for its buckets
        max_live_params=0,
        # DeepSpeed's default. BMTrain gathers a block ahead in any case, and its model counts it so.
        overlap_comm=spec.engine == "deepspeed" and stage == 3,
        precision=training.precision,
        micro_batch=training.micro_batch,
        grad_accum=training.grad_accum,
        seq_len=training.seq_len,  # rows are packed: all are as long
        recompute=_recompute(spec),
        flash_attention=_is_fused(spec),
        row_masks=not _takes_segments(spec),
        dp=resources.world_size,
        nodes=resources.nodes,
        gpu=gpu_name(spec),
        gpu_memory_mib=spec.gpu.memory_mib if spec.gpu and resources.gpus_per_node else 0,
        host_memory_gb=(host_capacity(spec) or 0) / GB,
        metric="nvml",
    )
    if spec.task in TRAINING_TASKS:
        return setup
    rows = spec.generation.batch if spec.generation else training.micro_batch
    return replace(setup, mode="infer", micro_batch=rows, grad_accum=1, recompute="none")


def _described(spec: JobSpec, model: Model, work: Workload) -> Setup:
    """A program of its own, as the job describes it; what it doesn't say is as in jobs of ours."""
    resources, trains = spec.resources, work.mode == "train"
    engine: Engine = TRAINING_ENGINES.get(work.engine, "none")
    stage = 0 if engine in ("none", "ddp") else work.zero_stage
    return Setup(
        shape=shape_of(model),
        mode="infer" if not trains else "lora" if spec.method else "full",
        lora_rank=spec.method.rank if spec.method and trains else 0,
        lora_targets=tuple(_targets(spec)) if trains else (),
        engine=engine,
        engine_version=_version(spec, work.engine),
        zero_stage=stage,
        offload_optimizer=work.offload_optimizer,
        offload_param=work.offload_param,
        pin_memory=engine == "bmtrain",
        zero_init=engine == "bmtrain",  # of others it is not known: the larger need counts
        overlap_comm=engine == "deepspeed" and stage == 3,
        precision=work.precision,
        micro_batch=work.micro_batch,
        grad_accum=work.grad_accum,
        seq_len=work.seq_len,
        recompute="full" if engine == "bmtrain" and _always_recomputes(spec) else _recompute_named(work.recompute),
        flash_attention=work.flash_attention,
        tp=1 if trains else resources.world_size,  # LibCPM splits each matrix over its GPUs
        dp=resources.world_size if trains else 1,
        nodes=resources.nodes,
        gpu=gpu_name(spec),
        gpu_memory_mib=spec.gpu.memory_mib if spec.gpu and resources.gpus_per_node else 0,
        host_memory_gb=(host_capacity(spec) or 0) / GB,
        metric="nvml",
    )


def as_loaded(setup: Setup) -> Setup:
    """As the host sees it: with DDP every rank reads the model in fp32; FSDP2 copies its rows from a mapped file."""
    return replace(setup, precision="fp32", zero_init=False) if setup.engine == "ddp" else setup


def shape_of(model: Model) -> Shape:
    """By the dimensions alone: `parameters_stated` is no longer true of a model of which a job changes a part."""
    return Shape(
        hidden=model.hidden,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.key_value_heads,
        ffn=model.ffn,
        vocab=model.vocab,
        gated_mlp=model.gated_mlp,
        tied_embeddings=model.tied_embeddings,
        kind=_kind(model),
        head_dim=model.head_dim or 0,
    )


def gpu_name(spec: JobSpec) -> str:
    """In gpus.yaml; `cpu` without GPUs; empty where neither the job nor its cluster says which."""
    return (spec.resources.gpu or spec.cluster.gpu or "") if spec.resources.gpus_per_node else CPU


def host_capacity(spec: JobSpec) -> int | None:
    """Bytes of a node that the job can have; None where nobody says."""
    return spec.resources.memory_per_node_bytes or spec.cluster.memory_per_node_bytes


def _kind(model: Model) -> Kind:
    kinds: dict[str, Kind] = {"glm": "glm", "t5": "t5", "bert": "bert"}
    return kinds.get(model.block, "decoder")


def _engine(spec: JobSpec) -> tuple[Engine, int]:
    """Our torch engine is DDP at stage 0, else FSDP2, which gives weights back after use whatever the stage."""
    stage = spec.training.zero_stage
    if spec.engine == "torch":
        return ("fsdp", 3) if stage else ("ddp", 0)
    return ("bmtrain", stage) if spec.engine == "bmtrain" else ("deepspeed", stage)


def _targets(spec: JobSpec) -> Iterator[str]:
    if spec.method is None or spec.model is None:
        return
    for name in spec.method.targets:
        role = ADAPTED[name]
        if spec.model.gated_mlp or name not in ("w_0", "w_1"):
            yield role
        elif name == "w_0":
            yield "up"


def _version(spec: JobSpec, engine: str) -> str:
    """`0.2.3.post2 torch 1.13.1`: as far as the image says."""
    image = spec.image or Image(tag="none")
    own = {"bmtrain": image.bmtrain, "deepspeed": image.deepspeed}.get(engine)
    return " ".join(filter(None, (own, f"torch {image.torch}" if image.torch else None)))


def _recompute(spec: JobSpec) -> Recompute:
    always = spec.engine == "bmtrain" and _always_recomputes(spec)
    return "full" if always else _recompute_named(spec.training.recompute)


def _always_recomputes(spec: JobSpec) -> bool:
    """BMTrain before 1.0 has no blocks but CheckpointBlock."""
    return spec.image is not None and (spec.image.bmtrain or "1").startswith("0.")


def _recompute_named(word: str) -> Recompute:
    return "full" if word == "full" else "none"


def _is_fused(spec: JobSpec) -> bool:
    """Whether attention stores no scores: flash-attn, or torch's own kernel since 2.0.

    Without an image its torch is taken to be current.
    """
    image = spec.image or Image(tag="none")
    version = tuple(int(part) for part in (image.torch or "2.0").split(".")[:2])
    in_torch = version >= FUSED_ATTENTION_TORCH
    if spec.training.attention == "sdpa":
        return in_torch
    if spec.training.attention == "math":
        return False
    has_flash = image.flash_attn is not None or spec.training.attention == "flash"
    return in_torch or (has_flash and (spec.gpu is None or spec.gpu.sm >= FLASH_ATTENTION_2_SM))


def _takes_segments(spec: JobSpec) -> bool:
    """Whether our trainer finds a kernel that needs no mask (model/attention.py); without an image, if told so."""
    training, image = spec.training, spec.image or Image(tag="none")
    has_kernel = training.attention in ("flash", "varlen") or (
        training.attention == "auto"
        and (image.flash_attn is not None or (image.torch is not None and version_tuple(image.torch) >= VARLEN_TORCH))
    )
    new_enough = spec.gpu is not None and spec.gpu.sm >= FLASH_ATTENTION_2_SM
    return has_kernel and new_enough and bool(spec.resources.gpus_per_node) and training.precision != "fp32"
