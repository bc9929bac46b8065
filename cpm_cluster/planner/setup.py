"""What decides the memory and the time of a run: the shape of the model, and how it is trained or served."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

Kind = Literal["decoder", "glm", "t5", "bert"]
Mode = Literal["full", "lora", "qlora", "reward", "infer"]
Engine = Literal["bmtrain", "deepspeed", "fsdp", "ddp", "megatron", "none"]
Recompute = Literal["none", "selective", "full"]
Metric = Literal["allocated", "reserved", "nvml", "unknown"]

# Bytes of a stored element; GPTQ and NF4 keep scales beside the codes (see weights_quantised).
HALF = ("fp16", "bf16", "fp16_pure", "bf16_pure", "bf16_fp32grad", "fp8")
QUANTISED = ("nf4", "nf4_dq", "int4_gptq", "int4", "int8_gptq", "int8")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a transformer, as in its config.json; a search plans thousands of setups with the same one."""

    hidden: int
    layers: int  # of a T5: encoder + decoder
    heads: int
    ffn: int  # width of one branch
    vocab: int
    kv_heads: int
    gated_mlp: bool = True
    tied_embeddings: bool = False
    kind: Kind = "decoder"
    head_dim: int = 0  # 0: hidden / heads
    parameters_stated: int = 0  # 0: as the formula says

    @property
    def size_of_head(self) -> float:
        return self.head_dim or self.hidden / self.heads

    @cached_property
    def attention_width(self) -> int:
        return round(self.heads * self.size_of_head)

    @cached_property
    def kv_width(self) -> int:
        return round(self.kv_heads * self.size_of_head)

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of one block."""
        shapes = {
            "q": (self.hidden, self.attention_width),
            "k": (self.hidden, self.kv_width),
            "v": (self.hidden, self.kv_width),
            "o": (self.attention_width, self.hidden),
            "up": (self.hidden, self.ffn),
            "down": (self.ffn, self.hidden),
        }
        if self.gated_mlp:
            shapes["gate"] = (self.hidden, self.ffn)
        return shapes

    @cached_property
    def adapter_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of what an adapter can sit on, in one block; `qkv` is one fused matrix."""
        fused = {"qkv": (self.hidden, self.attention_width + 2 * self.kv_width)}
        return {**self.linear_shapes, **fused}

    @cached_property
    def linear_parameters_per_layer(self) -> int:
        return sum(rows * columns for rows, columns in self.linear_shapes.values())

    @property
    def embedding_parameters(self) -> int:
        """One vocabulary matrix."""
        return self.vocab * self.hidden

    @property
    def vocabulary_matrices(self) -> int:
        """Embedding and output head, or one for both."""
        return 1 if self.tied_embeddings else 2

    @cached_property
    def parameters(self) -> int:
        """All of them, embeddings included."""
        if self.parameters_stated:
            return self.parameters_stated
        block = self.linear_parameters_per_layer + 2 * self.hidden
        cross = 0
        if self.kind == "t5":  # the decoder's half attends to the encoder as well
            cross = self.layers // 2 * (2 * self.hidden * (self.attention_width + self.kv_width))
        return self.layers * block + cross + self.vocabulary_matrices * self.embedding_parameters + self.hidden

    @property
    def parameters_per_layer(self) -> int:
        """The mean of the blocks."""
        return (self.parameters - self.vocabulary_matrices * self.embedding_parameters) // self.layers


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One configuration of a run."""

    shape: Shape
    mode: Mode = "full"
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    trained_parameters_stated: int = 0  # 0: all, or r (in + out) over the adapted matrices

    engine: Engine = "none"
    engine_version: str = ""
    zero_stage: int = 0  # what is sharded over the data-parallel ranks: 1 states, 2 + gradients, 3 + weights
    offload_optimizer: bool = False
    offload_param: bool = False
    pin_memory: bool = False
    zero_init: bool = True  # weights are partitioned while the model is built
    frozen_first: bool = False  # before BMTrain lays out its blocks, which then hold no gradients of frozen weights
    loads_half: bool = False  # the checkpoint is read in half precision
    bucket_elements: int = 0  # 0: the engine's default
    max_live_params: int = 0  # 0: the engine's default
    overlap_comm: bool = False

    precision: str = "bf16"
    optimizer: str = "adamw"  # others: MOMENTS in states.py, with paged_ before and _8bit behind
    micro_batch: int = 1
    grad_accum: int = 1
    grad_accum_stated: bool = True  # False: there may be gradients of an earlier micro batch
    seq_len: int = 2048  # of the longest sample
    mean_tokens: int = 0  # of a sample, where lengths differ; 0: all as long as seq_len
    recompute: Recompute = "none"
    flash_attention: bool = True
    row_masks: bool = True  # our torch engine: attention is told by a mask which documents of a row see each other
    sequence_parallel: bool = False
    fused_cross_entropy: bool = False  # the loss never holds all logits in fp32 at once
    cut_cross_entropy: bool = False  # the loss holds no logits at all (Wijmans et al. 2024)

    compiled: bool = False  # torch.compile

    tp: int = 1
    pp: int = 1
    dp: int = 1
    context_parallel: int = 1
    virtual_stages: int = 1  # chunks of an interleaved pipeline
    embeddings_count_as_layers: bool = False  # in the split over pipeline stages
    shard_within_node: bool = False  # and replicate over nodes (HSDP)
    nodes: int = 1

    gpu: str = ""  # its name in configs/gpus.yaml
    gpu_memory_mib: int = 0  # usable, MiB; 0: not known
    host_memory_gb: float = 0.0  # of one node, GB; 0: not known
    metric: Metric = "nvml"

    @property
    def accumulates(self) -> bool:
        """Whether a forward pass may find gradients of an earlier micro batch."""
        return self.grad_accum > 1 or not self.grad_accum_stated

    @property
    def torch_version(self) -> tuple[int, int]:
        """(major, minor), as far as the version of the software says; (0, 0) where it doesn't.

        The mixed precision of apex is that of torch before 1.6; transformers 4.27 came out with torch 2.0.
        """
        stated = re.search(r"torch (\d+)\.(\d+)", self.engine_version)
        if stated:
            return int(stated.group(1)), int(stated.group(2))
        if "apex" in self.engine_version:
            return 1, 5
        return (1, 13) if () < self.transformers_version < (4, 27) else (0, 0)

    @property
    def keeps_gradients(self) -> bool:
        """Whether those of a step are there in the next: before torch 2.0 zero_grad fills them with zeros.

        torch/nn/modules/module.py and torch/optim/optimizer.py; DeepSpeed and Megatron drop them by themselves.
        """
        return self.engine in ("none", "ddp", "fsdp") and (0, 0) < self.torch_version < (2, 0)

    @property
    def transformers_version(self) -> tuple[int, ...]:
        """(4, 49); empty where nothing says."""
        return _transformers_version(self.engine_version)

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp * self.context_parallel

    @property
    def gpus_per_node(self) -> int:
        return -(-self.gpus // self.nodes)

    @property
    def ranks_per_node(self) -> int:
        """Processes: one for each GPU, but a single one where layers are merely placed on several cards."""
        return 1 if self.engine == "none" else self.gpus_per_node

    @property
    def shards(self) -> int:
        """Ranks that a sharded state is spread over."""
        ranks = self.dp * self.context_parallel
        return max(1, ranks // self.nodes) if self.shard_within_node else ranks

    @property
    def tokens(self) -> int:
        """Tokens that one GPU holds of a micro batch."""
        return self.micro_batch * self.seq_len // self.context_parallel

    @property
    def kv_width(self) -> int:
        """Of the keys on one tensor-parallel rank, which has at least one head: fewer heads than ranks are copied."""
        return round(-(-self.shape.kv_heads // self.tp) * self.shape.size_of_head)

    @property
    def quantised(self) -> bool:
        return self.precision in QUANTISED

    @property
    def autocasts(self) -> bool:
        """Half precision by torch's autocast, over fp32 weights."""
        return self.engine in ("none", "ddp") and self.precision in ("fp16", "bf16")

    @property
    def trains_adapters(self) -> bool:
        return self.mode in ("lora", "qlora")

    @property
    def adapter_parameters(self) -> int:
        """r (in + out) for each adapted matrix (LoRA, Hu et al. 2021), those of the head included."""
        shapes = self.shape.adapter_shapes
        per_layer: float = sum(sum(shapes[name]) for name in self.lora_targets if name in shapes)
        if self.shape.kind == "t5":  # half of its layers attend twice
            per_layer += sum(sum(shapes[name]) for name in self.lora_targets if name in ("q", "k", "v", "o")) / 2
        head = self.shape.hidden + self.shape.vocab if "lm_head" in self.lora_targets else 0
        return round(self.lora_rank * (self.shape.layers * per_layer + head))

    @property
    def fully_trained_vocabulary(self) -> int:
        """Parameters of embeddings and heads that an adapter run trains whole (new tokens)."""
        return sum(name in self.lora_targets for name in ("embed_full", "head_full")) * self.shape.embedding_parameters

    @property
    def trained_parameters(self) -> int:
        if self.mode == "infer":
            return 0
        if self.trained_parameters_stated:
            return self.trained_parameters_stated
        if self.trains_adapters:
            return self.adapter_parameters + self.fully_trained_vocabulary
        return self.shape.parameters


@lru_cache
def _transformers_version(software: str) -> tuple[int, ...]:
    stated = re.search(r"transformers (\d+)\.(\d+)", software)
    return (int(stated.group(1)), int(stated.group(2))) if stated else ()
