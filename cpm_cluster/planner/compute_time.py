"""Seconds that one GPU computes in a micro step: matrix products, attention, memory traffic, and the CPU's launches.

Symbols as in step_time.py. A layer's parts add up: kernels run one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cpm_cluster.planner.accelerators import Accelerator
from cpm_cluster.planner.flops import (
    adapter_flops,
    attention_forward,
    causal_share,
    head_forward,
    linear_forward,
    linear_parameters,
    passes,
    recomputes_all,
)
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.time_constants import Constants

# Bytes of memory traffic, counted in the code named.
LOGIT_BYTES = 40  # transformers 4's loss, for each logit: product 2, fp32 copy 6, shift 8, softmax 8, backward 16
FUSED_LOGIT_BYTES = 10  # chunked, fused or compiled: written, read and overwritten by its gradient
ADAPTER_BYTES = 2  # for each element in and out of an adapted matrix, times the traffic of the software
CUDA_CORES = 0.9  # share of the peak of fp32 products without tensor cores: assumed
GRADIENT_BYTES = 8  # a gradient written, and added to what has accumulated
WIDE_GRADIENT_BYTES = 16  # a half-precision one added to an fp32 one in kernels of their own
NF4_PASSES = 1.25  # of a 16-bit copy: half a byte read and two written (bitsandbytes' kDequantizeBlockwise)
BACKWARD_LAUNCHES = 1.5  # kernels of a backward pass, which has no Python between them, beside a forward one


@dataclass(frozen=True)
class PipelineStage:
    """Layers of a pipeline stage, and whether the output head is there."""

    layers: float
    head: bool


@dataclass(frozen=True)
class LayerSeconds:
    """GPU seconds of one layer in one micro step."""

    linear: float
    attention: float
    activations: float  # through memory
    weights: float  # through memory

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.activations + self.weights


class Computation:
    """What one GPU computes in a micro step, at the rates that software and card reach."""

    def __init__(self, setup: Setup, gpu: Accelerator, constants: Constants) -> None:
        self.setup, self.gpu, self.constants = setup, gpu, constants
        self.passes = passes(setup)
        self.style = _style(setup)
        self.layer = self._layer_seconds()
        self.slowest = max(_stages(setup), key=self._stage_seconds)

    def gpu_seconds(self, stage: PipelineStage) -> float:
        return self.layer.total * stage.layers + (self.head_seconds() if stage.head else 0.0)

    def _stage_seconds(self, stage: PipelineStage) -> float:
        return max(self.gpu_seconds(stage), self.launch_seconds(stage))

    def _layer_seconds(self) -> LayerSeconds:
        setup, shape, done = self.setup, self.setup.shape, self.passes
        tokens, layers = setup.tokens / setup.tp, shape.layers
        operations = done.linear * linear_forward(shape) + adapter_flops(setup)
        linear = tokens * operations / layers / self.linear_rate
        attention = tokens * done.attention * attention_forward(shape, setup.seq_len) / layers / self.attention_rate
        elements = _activation_bytes(setup) * done.linear
        if not setup.flash_attention:
            elements += 5 * shape.heads * setup.seq_len / setup.tp * done.attention
        elements += ADAPTER_BYTES * _adapted_width(setup) / layers / setup.tp * done.linear
        traffic = setup.tokens * elements * self._traffic / self.gpu.memory_bandwidth
        parameters = linear_parameters(shape) / layers / setup.tp
        through = 2 * done.linear
        if not setup.trains_adapters and setup.mode != "infer":
            through += WIDE_GRADIENT_BYTES if setup.precision == "bf16_fp32grad" else GRADIENT_BYTES
        if setup.quantised:
            one_kernel = setup.precision in ("nf4", "nf4_dq") and self.style != "compiled"  # torchtune takes torchao's
            through += (NF4_PASSES if one_kernel else self.constants.dequantise) * 2 * done.linear
        return LayerSeconds(linear, attention, traffic, parameters * through / self.gpu.memory_bandwidth)

    def head_seconds(self) -> float:
        setup, shape = self.setup, self.setup.shape
        operations = self.passes.head * head_forward(shape) / self._head_rate
        fused = setup.fused_cross_entropy or self.style in ("compiled", "fused") or setup.engine == "bmtrain"
        logits = shape.vocab * (FUSED_LOGIT_BYTES if fused else LOGIT_BYTES) / self.gpu.memory_bandwidth
        return setup.tokens / setup.tp * (operations + logits)

    def launch_seconds(self, stage: PipelineStage) -> float:
        c, deepspeed = self.constants, self.setup.engine == "deepspeed" and self.setup.zero_stage >= 3
        count = 1 if self.setup.mode == "infer" else 1 + BACKWARD_LAUNCHES + recomputes_all(self.setup)
        launch = c.launch_transformers if self.style == "transformers" else c.launch_lean
        launch += c.launch_gather if deepspeed else 0
        launch += c.launch_unpack if self.setup.quantised else 0
        return stage.layers * count * launch

    @property
    def _linear_efficiency(self) -> float:
        c = self.constants
        if self.setup.precision == "fp32" and self.gpu.generation == "volta":
            return CUDA_CORES
        return {"volta": c.linear_volta, "ampere": c.linear_ampere, "hopper": c.linear_hopper}[self.gpu.generation]

    @property
    def _head_rate(self) -> float:
        return self._linear_efficiency * self.gpu.peak(self.setup.precision)

    @property
    def linear_rate(self) -> float:
        """FLOP/s of large matrix products."""
        fp8 = self.setup.precision == "fp8" and self.gpu.has_fp8
        return self._head_rate * (self.constants.fp8_gain if fp8 else 1)

    @property
    def attention_rate(self) -> float:
        """FLOP/s of attention: fused, or as matrix products whose scores go through memory.

        Fused kernels leave out the half that a causal mask hides, where there is one. FlashAttention 2 has none for
        Volta, Turing or fp32: there torch's memory-efficient one is taken to be as fast as FlashAttention 1, and no
        slower than the matrix products that it replaces.
        """
        c, peak = self.constants, self.gpu.peak(self.setup.precision)
        products = self._head_rate / (1 if self.setup.shape.size_of_head % 8 == 0 else c.unaligned_heads)
        if not self.setup.flash_attention:
            return products
        fused = peak * (products / self._head_rate) / (2 - causal_share(self.setup.shape))
        if self.gpu.generation == "volta" or self.setup.precision == "fp32":
            return max(products, fused * c.flash_ampere)
        if self.gpu.generation == "hopper":
            return fused * (c.cudnn_hopper if self.style == "fused" else c.flash_hopper)
        first = self.style == "torch" and self.setup.engine != "bmtrain"
        return fused * (c.flash_ampere if first else c.flash2_ampere)

    @property
    def _traffic(self) -> float:
        c = self.constants
        by_style = {"transformers": c.traffic_transformers, "torch": c.traffic_torch, "compiled": c.traffic_compiled}
        return by_style.get(self.style, c.traffic_fused)


def _style(setup: Setup) -> str:
    """How the software runs what lies between matrix products."""
    version = setup.engine_version.lower()
    if setup.engine == "megatron":
        return "fused"
    if setup.compiled or "torchtune" in version:  # whose recipes compile layer by layer
        return "compiled"
    if setup.engine in ("fsdp", "ddp", "bmtrain") and not setup.transformers_version:
        return "torch"
    return "transformers"


def _activation_bytes(setup: Setup) -> float:
    """What one layer writes for each token on one GPU: 34 h (Korthikanti et al. 2022), of a gated one 28 h + 8 f.

    The paper counts what is kept for the backward pass; a gated layer is counted in the same way.
    """
    shape, tp = setup.shape, setup.tp
    autocast = setup.autocasts and setup.mode == "full"
    wide = 2 if autocast or setup.precision == "fp32" else 1  # fp32 weights: what isn't a product is in fp32
    if shape.gated_mlp:
        whole, divided = 16 * shape.hidden, 12 * shape.hidden + 8 * shape.ffn
    else:
        whole, divided = 10 * shape.hidden, 8 * shape.hidden + 4 * shape.ffn
    return wide * (whole / (tp if setup.sequence_parallel else 1) + divided / tp)


def _adapted_width(setup: Setup) -> int:
    """Elements in and out of all adapted matrices, for each token."""
    return setup.adapter_parameters // setup.lora_rank if setup.trains_adapters and setup.lora_rank else 0


def _stages(setup: Setup) -> Iterator[PipelineStage]:
    """The stages that may be the slowest: the last, with the output head, and one in the middle.

    Layers that are merely placed on several cards take turns, so that all of them count.
    """
    layers, pp = setup.shape.layers, 1 if setup.engine == "none" else setup.pp
    if setup.embeddings_count_as_layers and pp > 1:
        most = -(-(layers + 2) // pp)
        yield PipelineStage(most - 1, True)
        yield PipelineStage(most, False)
    elif pp == 1 or setup.virtual_stages > 1 or layers % pp == 0:
        yield PipelineStage(layers / pp, True)
    else:
        yield PipelineStage(layers // pp, True)
        yield PipelineStage(-(-layers // pp), False)
