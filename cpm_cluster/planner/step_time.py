"""Seconds of one optimizer step, term by term, and the tokens/s and MFU that follow.

    step = micro steps × (slowest stage + exposed communication) + bubble + gradients + optimizer

A stage is the larger of what the GPU computes and of what the CPU needs to launch it. Symbols: T tokens of a micro step
on one GPU, L layers, h hidden, f FFN width, a heads, s sequence, V vocabulary, P parameters, n ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cpm_cluster.planner import communication
from cpm_cluster.planner.accelerators import Accelerator, accelerator
from cpm_cluster.planner.compute_time import Computation
from cpm_cluster.planner.flops import attention_forward, causal_share, model_flops
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.time_constants import CONSTANTS, FITTED, Constants
from cpm_cluster.specs.gpu import Gpu

GIGA = 1e9
ZERO = "ZeRO: Rajbhandari et al. 2020"
OFFLOAD = "ZeRO-Offload: Ren et al. 2021"
INFINITY = "ZeRO-Infinity: Rajbhandari et al. 2021"
MFU_LIMIT = 0.8  # nothing published exceeds it: a prediction above is an error of the inputs or of the model
FP8_PEAK = 2  # times the 16-bit peak, from compute capability 8.9

ADAM_BYTES = 30  # for each parameter on the GPU: states 12 read and written, gradient 4 read, half copy 2 written
# The same with a kernel for each operation (torch/optim/adamw.py), gradients clipped before (clip_grad.py): counted.
UNFUSED_ADAM_BYTES = 100
CPU_ADAM_BYTES = 28  # the same in host memory
USUAL_MICRO_STEPS = 8  # for each pipeline stage, as in Megatron's published runs: the bubble stays near 1/8

# The host, where nothing was measured on it. ZeRO-Offload's CPU-Adam (Ren et al. 2021) reaches about 100 GB/s; measured
# runs that can be solved for it (one server) 9 to 15. Too slow a guess is the safer one beside a time limit.
HOST_ADAM_GB_S = 15.0
OFFLOAD_SPREAD = 3.0

SPREAD = 0.20  # 88 % of the rows of left-out sources lie within: benchmarks/fit_planner_time.py
SPREAD_UNKNOWN = 0.45  # of a card or an engine that nothing was fitted on


@dataclass(frozen=True)
class TimeTerm:
    """A part of a step: its seconds, the formula that gave them, and where that is from."""

    name: str
    seconds: float
    formula: str
    source: str


@dataclass(frozen=True)
class StepTime:
    """One optimizer step of all GPUs together."""

    terms: tuple[TimeTerm, ...]
    spread: float  # the true time is within a factor of 1 + spread, at least four times in five
    gpus: int
    tokens: int  # of a step, over all GPUs
    model_flops_per_token: float
    masked_flops_per_token: float  # of these, what a causal mask makes needless
    peak_flops: float  # of one GPU, 16 bits, dense; 0: not known, of CPUs
    mfu_limit: float  # in units of that peak

    @property
    def seconds(self) -> float:
        return sum(term.seconds for term in self.terms)

    @property
    def low(self) -> float:
        """Seconds, lower end of the interval."""
        return self.seconds / (1 + self.spread)

    @property
    def high(self) -> float:
        """Seconds, upper end of the interval."""
        return self.seconds * (1 + self.spread)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens / self.seconds / self.gpus

    @property
    def tokens_per_day(self) -> float:
        """Of all GPUs."""
        return self.tokens / self.seconds * 86_400

    @property
    def mfu(self) -> float | None:
        """Model FLOPs, nothing recomputed counted, over the dense 16-bit peak; None where that is not known."""
        if not self.peak_flops:
            return None
        return self.tokens_per_second_per_gpu * self.model_flops_per_token / self.peak_flops

    @property
    def credible(self) -> bool:
        """Whether the MFU is one that has been seen anywhere, the masked half of attention not counted."""
        if not self.peak_flops:
            return True
        unmasked = self.model_flops_per_token - self.masked_flops_per_token
        return self.tokens_per_second_per_gpu * unmasked / self.peak_flops <= self.mfu_limit

    def share(self, term: TimeTerm) -> float:
        return term.seconds / self.seconds


def step_time(setup: Setup, card: Gpu | None = None, constants: Constants = CONSTANTS) -> StepTime:
    """The time of one optimizer step; of one forward pass over the batch where `mode` is infer.

    `card` replaces the packaged catalogue's entry of `setup.gpu`. Accumulation that isn't stated is taken as usual for
    a pipeline of this depth. Where lengths differ, the time follows the mean one.
    """
    if not setup.grad_accum_stated:
        setup = replace(setup, grad_accum=USUAL_MICRO_STEPS * setup.pp, grad_accum_stated=True)
    if setup.mean_tokens:
        setup = replace(setup, seq_len=setup.mean_tokens, mean_tokens=0)
    model = _Model(setup, accelerator(setup.gpu, card), constants)
    return StepTime(
        terms=tuple(term for term in model.terms() if term.seconds > 0),
        spread=model.spread(),
        gpus=setup.gpus,
        tokens=setup.micro_batch * setup.seq_len * setup.dp * setup.grad_accum,
        model_flops_per_token=model_flops(setup),
        masked_flops_per_token=model.computation.passes.model_attention
        * attention_forward(setup.shape, setup.seq_len)
        * causal_share(setup.shape)
        / 2,
        peak_flops=model.gpu.peak(setup.precision),
        mfu_limit=MFU_LIMIT * (FP8_PEAK if setup.precision == "fp8" and model.gpu.has_fp8 else 1),
    )


def tokens_per_second_per_gpu(setup: Setup) -> float:
    """Padded tokens that one GPU trains on in a second, the mean over all of them."""
    return step_time(setup).tokens_per_second_per_gpu


class _Model:
    """The terms of one configuration."""

    def __init__(self, setup: Setup, gpu: Accelerator, constants: Constants) -> None:
        self.setup, self.gpu, self.constants = setup, gpu, constants
        self.at = communication.rates(setup, gpu, constants.node_use, constants.fabric_use)
        self.computation = Computation(setup, gpu, constants)

    def terms(self) -> Iterator[TimeTerm]:
        computing = list(self._computing())
        compute = sum(term.seconds for term in computing)
        exposed = list(self._exposed(compute))
        yield from computing
        yield from exposed
        yield from self._once_a_step(compute / self.setup.grad_accum)
        micro = (compute + sum(term.seconds for term in exposed)) / self.setup.grad_accum
        yield from self._bubble(micro)
        yield from self._waiting(micro * self.setup.grad_accum)

    def _computing(self) -> Iterator[TimeTerm]:
        """What the slowest stage computes, in all micro steps."""
        of, count = self.computation, self.setup.grad_accum
        stage, layer, done = of.slowest, of.layer, of.passes
        layers, per = stage.layers * count, f"× {stage.layers:g} layers × {count} micro steps"
        products = f"{done.linear:g} passes × 2P T / ({of.linear_rate / 1e12:.0f} TFLOP/s) {per}"
        attention = f"{done.attention:g} passes × 4 s h T / ({of.attention_rate / 1e12:.0f} TFLOP/s) {per}"
        yield TimeTerm("linear layers", layer.linear * layers, products, FITTED)
        yield TimeTerm("attention", layer.attention * layers, attention, FITTED)
        through = f"bytes / memory bandwidth {per}"
        yield TimeTerm("activations through memory", layer.activations * layers, through, FITTED)
        yield TimeTerm("weights through memory", layer.weights * layers, through, FITTED)
        if stage.head:
            head = f"{done.head:g} passes × 2 V h T, and the logits through memory"
            yield TimeTerm("output head", of.head_seconds() * count, head, "bytes of the logits counted")
        idle = max(0.0, of.launch_seconds(stage) - of.gpu_seconds(stage))
        yield TimeTerm("waiting for kernel launches", idle * count, f"CPU time {per}, above the GPU's", FITTED)

    def _exposed(self, compute: float) -> Iterator[TimeTerm]:
        """Communication of the micro steps that computation doesn't hide."""
        setup, stage = self.setup, self.computation.slowest
        count = self.setup.grad_accum
        tensor = communication.tensor_seconds(setup, stage.layers, self.at) * count
        if setup.engine == "megatron" and setup.flash_attention:  # TransformerEngine sends while it multiplies
            tensor = self._not_hidden(tensor, compute)
        yield TimeTerm("tensor parallel", tensor, "all-reduces of T h: 2 a layer and pass", "Shoeybi et al. 2019")
        shards = communication.shard_seconds(setup, self._local_parameters, self.at) * count
        yield TimeTerm(
            "sharded weights",
            self._not_hidden(shards, compute),
            "weights gathered twice, gradients scattered, less what is hidden",
            ZERO,
        )
        sent = communication.pipeline_seconds(setup, self.at) * count
        yield TimeTerm(
            "pipeline transfers",
            self._not_hidden(sent, compute),
            "T h to the next stage and back, less what is hidden",
            "Narayanan et al. 2021",
        )
        yield TimeTerm("weights from the host", self._streaming() * count, "2P/n forward and backward / PCIe", INFINITY)

    @property
    def _local_parameters(self) -> float:
        """Of one pipeline stage and tensor slice."""
        return self.setup.shape.parameters / self.setup.tp / self.setup.pp

    def _not_hidden(self, communicating: float, computing: float) -> float:
        c, setup = self.constants, self.setup
        overlap = c.overlap
        if setup.engine == "deepspeed":
            overlap = c.overlap_deepspeed if setup.overlap_comm else 0.0
        return communicating - overlap * min(communicating, computing)

    def _streaming(self) -> float:
        setup = self.setup
        if not setup.offload_param:
            return 0.0
        shard = 2 * self._local_parameters / setup.shards * (2 if setup.mode != "infer" else 1)
        return shard / self.at.host

    def _once_a_step(self, micro: float) -> Iterator[TimeTerm]:
        setup = self.setup
        if setup.mode == "infer":
            return
        reduced = communication.reduce_seconds(setup, self._local_parameters, self.at)
        behind = micro * (setup.grad_accum if setup.zero_stage == 2 else 1)  # stage 2 reduces in each micro step
        yield TimeTerm(
            "gradients",
            self._not_hidden(reduced, behind),
            "all-reduce of 2P, less what is hidden",
            "ring all-reduce: Thakur et al. 2005",
        )
        at_once = 1 if setup.engine == "none" else setup.pp  # cards of one process take turns
        trained = setup.trained_parameters / setup.tp / at_once
        mine = trained / (setup.shards if setup.zero_stage else 1)
        if not setup.offload_optimizer:
            through = ADAM_BYTES if self._fuses_the_step else UNFUSED_ADAM_BYTES
            seconds = through * mine / self.gpu.memory_bandwidth
            yield TimeTerm(
                "optimizer", seconds, f"{through}P/n / memory bandwidth", "Adam, Kingma and Ba 2014: bytes counted"
            )
            return
        on_node = mine * setup.ranks_per_node
        seconds = CPU_ADAM_BYTES * on_node / (HOST_ADAM_GB_S * GIGA)
        yield TimeTerm("optimizer on the CPU", seconds, f"{CPU_ADAM_BYTES} B / {HOST_ADAM_GB_S:g} GB/s a node", OFFLOAD)
        moved = 4 * mine / self.at.host
        yield TimeTerm(
            "gradients to the host", moved * (setup.grad_accum + 1) / 2, "2P/n there and back / PCIe", OFFLOAD
        )

    @property
    def _fuses_the_step(self) -> bool:
        """Transformers' trainer leaves the step to torch's AdamW or one like it; DeepSpeed and apex have a kernel."""
        return self.computation.style != "transformers" or self.setup.engine == "deepspeed"

    def _bubble(self, micro: float) -> Iterator[TimeTerm]:
        """The pipeline fills and drains: (pp - 1) / chunks micro steps of a mean stage (Narayanan et al. 2021)."""
        setup = self.setup
        if setup.pp == 1 or setup.engine == "none":
            return
        layers = max(self.computation.slowest.layers, setup.shape.layers / setup.pp)
        mean = micro * setup.shape.layers / setup.pp / layers
        seconds = (setup.pp - 1) / setup.virtual_stages * mean
        yield TimeTerm("pipeline bubble", seconds, "(pp - 1) / chunks micro steps", "Narayanan et al. 2021")

    def _waiting(self, seconds: float) -> Iterator[TimeTerm]:
        share = self.constants.stragglers * math.log2(self.setup.nodes)
        yield TimeTerm("waiting for the slowest node", share * seconds, f"{share:.1%} of the micro steps", FITTED)

    def spread(self) -> float:
        spread = SPREAD if self.gpu.known else SPREAD_UNKNOWN
        if self.setup.offload_optimizer or self.setup.offload_param:
            spread = OFFLOAD_SPREAD
        return spread
