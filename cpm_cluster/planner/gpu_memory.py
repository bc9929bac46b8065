"""GPU memory as a timeline: what is held at each instant of a run, and the fullest of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from cpm_cluster.planner.activations import Activations, activations, logits_beyond
from cpm_cluster.planner.deepspeed_states import states_beyond, step_beyond
from cpm_cluster.planner.fit import Component
from cpm_cluster.planner.fsdp_states import records_streams, written_for_fsdp
from cpm_cluster.planner.memory_constants import CONSTANTS, FITTED, MIB, MemoryConstants
from cpm_cluster.planner.model_states import model_states
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.stages import stages
from cpm_cluster.planner.states import States, part

STAGING = "init staging"
STEP = "optimizer step"
FSDP_STREAMS = "torch/distributed/fsdp, record_stream: its size is assumed"
Parts = tuple[Component, ...]
FitVerdict = Literal["fits", "tight", "does not fit", "capacity unknown"]

# How far each kind of term may be off: chosen so that no run of measured_runs.csv that died is said to fit.
LASTING = 0.03  # weights, gradients, states
LASTING_UNREAD = 0.05  # the same with BMTrain: no reading of it is published, only what ran and what did not
PASSING = 0.20  # activations, logits, buffers in flight
PASSING_PLAIN = 0.12  # the same where models are written for the engine (FSDP programs), without wrappers
OUTSIDE = 0.20  # contexts
PIPELINE = 0.21  # any term of a pipelined or tensor-parallel run: stages differ, and groups are made as they are used


@dataclass(frozen=True)
class Instant:
    """What one GPU holds at one moment."""

    name: str
    outside: Parts  # of torch's allocator
    lasting: Parts
    passing: Parts  # comes and goes within a step
    wasted: Parts = ()  # reserved by the allocator, which gives it back when it must
    passing_spread: float = PASSING
    lasting_spread: float = LASTING
    spread: float = 0.0  # at least so uncertain is every term
    unsure: int = 0  # bytes that may come on top
    maybe_live_alone: bool = False  # what the reading shows isn't stated: it may be live tensors alone

    @property
    def components(self) -> Parts:
        return (*self.outside, *self.lasting, *self.passing, *self.wasted)

    @property
    def bytes(self) -> int:
        return sum(component.bytes for component in self.components)

    @property
    def low(self) -> int:
        if self.maybe_live_alone:
            return replace(self, outside=(), wasted=())._bound(-1)
        return self._bound(-1)

    @property
    def high(self) -> int:
        return self._bound(1) + self.unsure

    def _bound(self, sign: int) -> int:
        dynamic = (*self.passing, *self.wasted)
        kinds = (self.outside, OUTSIDE), (self.lasting, self.lasting_spread), (dynamic, self.passing_spread)
        return round(sum(c.bytes * (1 + sign * max(share, self.spread)) for parts, share in kinds for c in parts))


@dataclass(frozen=True)
class GpuMemory:
    """The instants of a run, in their order."""

    instants: tuple[Instant, ...]

    @property
    def binding(self) -> Instant:
        """The fullest: what the card must hold."""
        return max(self.instants, key=lambda instant: instant.bytes)

    @property
    def observed(self) -> Instant:
        """The fullest of those that last: nvidia-smi during training misses the start."""
        lasting = [instant for instant in self.instants if instant.name != STAGING]
        return max(lasting, key=lambda instant: instant.bytes)

    @property
    def high(self) -> int:
        return max(instant.high for instant in self.instants)

    @property
    def low(self) -> int:
        return max(instant.low for instant in self.instants)

    def verdict(self, usable_mib: int) -> FitVerdict:
        """`fits` only where the high end does."""
        if not usable_mib:
            return "capacity unknown"
        if self.low > usable_mib * MIB:
            return "does not fit"
        return "fits" if self.high <= usable_mib * MIB else "tight"


def reading(memory: GpuMemory, setup: Setup) -> Instant:
    """What the metric of the setup shows: torch's counters keep the peak of the start, nvidia-smi doesn't."""
    return memory.binding if setup.metric in ("allocated", "reserved") else memory.observed


def gpu_need(setup: Setup, constants: MemoryConstants = CONSTANTS) -> GpuMemory:
    """What a card must have: all that nvidia-smi would show but for what the allocator can give back.

    Of Megatron's equal blocks it can't, of BMTrain's gathered ones only by stopping both streams at every block.
    """
    shown = setup if setup.metric == "nvml" else replace(setup, metric="nvml")  # a copy is a third of a plan
    return gpu_memory(shown, constants, cache=setup.engine in ("megatron", "bmtrain"))


def gpu_memory(setup: Setup, constants: MemoryConstants = CONSTANTS, cache: bool = True) -> GpuMemory:
    """By the metric of the setup: live tensors, what the allocator has reserved, or all that the card shows."""
    cache = cache and setup.metric != "allocated"
    outside = _outside_the_allocator(setup, constants)
    passing_spread = PASSING_PLAIN if written_for_fsdp(setup) else PASSING
    lasting_spread = LASTING_UNREAD if setup.engine == "bmtrain" else LASTING
    spread, unstated = PIPELINE if setup.engine == "megatron" else 0.0, setup.metric == "unknown"
    instants: list[Instant] = []
    for stage in stages(setup):
        states = model_states(setup, stage)
        kept = activations(setup, stage, constants)
        wider = states_beyond(setup, stage)
        for name, lasting, passing in _timeline(setup, states, kept, cache):
            wasted = _fragmentation(setup, passing, constants) if cache else ()
            unsure = wider + logits_beyond(setup, passing, constants)
            if name == STEP:
                unsure += step_beyond(setup, stage)
            where = f"{name}, {stage.name}" if stage.name else name
            instants.append(
                Instant(
                    where, outside, lasting, passing, wasted, passing_spread, lasting_spread, spread, unsure, unstated
                )
            )
    return GpuMemory(tuple(instants))


def _timeline(setup: Setup, states: States, kept: Activations, cache: bool) -> Iterator[tuple[str, Parts, Parts]]:
    """(instant, what is there for long, what comes and goes)."""
    if states.staging:
        yield STAGING, states.staging, ()
    if setup.mode == "infer":
        yield from _generating(states, kept, cache)
        return
    # Flat buffers of the step are as large as a state: the cache has no free piece of that size, and keeps them.
    flat = states.flat_in_step if cache else ()
    rest = (*states.at_rest, *flat)
    earlier = states.gradients if setup.accumulates or setup.keeps_gradients else ()
    whole = (*rest, *states.gradients)
    # BMTrain gathers in a stream of its own: what that leaves free serves no other stream, and no larger matrix.
    pool = states.reducing if cache and setup.engine == "bmtrain" else ()
    yield (
        "end of the forward pass",
        (*rest, *earlier, *pool),
        (*states.computing, *states.in_head, *kept.kept, *kept.head),
    )
    last, first = (*rest, *earlier, *states.reducing), (*whole, *states.reducing)
    yield "backward pass of the last block", last, (*states.computing, *kept.kept, *kept.extra)
    yield "backward pass of the first block", first, (*states.computing, *kept.block)
    step = states.stepping if cache else (*states.stepping, *states.flat_in_step)
    yield STEP, (*whole, *step), ()


def _generating(states: States, kept: Activations, cache: bool) -> Iterator[tuple[str, Parts, Parts]]:
    """Of a prompt that is read whole its blocks are the cache's when its logits are made, which are larger pieces."""
    held = (*states.computing, *kept.kept)
    yield "decoding", states.at_rest, (*held, *kept.head, *(kept.block if cache else ()))
    if kept.block:
        yield "a block of the prompt", states.at_rest, (*held, *kept.block)
    if kept.extra:
        yield "the step after the prompt", states.at_rest, (*held, *kept.extra)


def _outside_the_allocator(setup: Setup, constants: MemoryConstants) -> Parts:
    if setup.metric in ("allocated", "reserved"):
        return ()
    parts = [part("CUDA context", f"{constants.context:g} MiB", constants.context * MIB, FITTED)]
    groups = _communicators(setup)
    if groups:
        each = constants.communicator_across_nodes if setup.nodes > 1 else constants.communicator
        parts.append(part("NCCL", f"{groups} × {each:g} MiB", groups * each * MIB, FITTED))
    return tuple(parts)


def _communicators(setup: Setup) -> int:
    if setup.engine == "bmtrain" and setup.mode != "infer" and setup.gpus == 1:
        return 1  # made even for one rank (bmtrain/init.py)
    if setup.gpus == 1 or setup.engine == "none":
        return 0
    return sum((setup.dp > 1, setup.tp > 1, setup.pp > 1, setup.tp * setup.pp > 1))  # the last: the world


def _fragmentation(setup: Setup, passing: Parts, constants: MemoryConstants) -> Parts:
    """Blocks that the allocator reserves and can't use for the next request."""
    share = constants.pipeline_fragmentation if setup.engine == "megatron" else constants.fragmentation
    size = share * sum(component.bytes for component in passing if component.name != "logits")
    if setup.mean_tokens:
        usual = min(1.0, setup.mean_tokens / 2 / setup.seq_len)
        size += constants.ragged * usual * sum(c.bytes for c in passing if c.name == "logits")
    parts = [part("fragmentation", f"{share:.0%} of what comes and goes", size, FITTED)]
    if records_streams(setup):
        inputs = sum(c.bytes for c in passing if c.name == "inputs of the blocks")
        parts.append(part("freed too late", "inputs of the blocks once more", inputs, FSDP_STREAMS))
    return tuple(parts)
