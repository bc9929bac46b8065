"""Host memory: pinned rounding, what is offloaded, how weights are loaded, and the seed's 140 GB."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planned_shapes import CHATGLM_6B

from cpm_cluster.planner.host_memory import host_memory, pinned
from cpm_cluster.planner.setup import Setup, Shape

GB = 10**9
CPM_9G_8B = Shape(hidden=4096, layers=32, heads=32, kv_heads=32, ffn=14336, vocab=119696)
GLM_10B = Shape(
    hidden=4096,
    layers=48,
    heads=64,
    kv_heads=64,
    ffn=16384,
    vocab=50048,
    gated_mlp=False,
    tied_embeddings=True,
    kind="glm",
)
OFFLOADED = Setup(
    shape=CHATGLM_6B,
    engine="deepspeed",
    zero_stage=3,
    offload_optimizer=True,
    offload_param=True,
    pin_memory=True,
    zero_init=False,
    loads_half=True,
    precision="fp16",
    grad_accum=8,
)


@pytest.mark.parametrize(("size", "held"), [(1, 1), (4096, 4096), (4097, 8192), (25e9, 2**35)])
def test_pinned_buffers_are_powers_of_two(size: float, held: float) -> None:
    """pytorch#95823, #150517"""
    assert pinned(OFFLOADED, size) == held
    assert pinned(replace(OFFLOADED, pin_memory=False), size) == size


def test_the_least_for_10b_is_140_gb() -> None:
    """The seed's row of a single A100: 16 bytes a parameter with BMTrain's AdamOffload."""
    setup = Setup(shape=CPM_9G_8B, engine="bmtrain", zero_stage=3, precision="fp16", offload_optimizer=True)
    assert host_memory(setup).binding.bytes / GB == pytest.approx(140, rel=0.10)


@pytest.mark.parametrize(("ranks", "measured_gb"), [(1, 153.4), (2, 158.2), (4, 168.4), (8, 189.3)])
def test_each_rank_adds_itself_and_the_states_stay(ranks: int, measured_gb: float) -> None:
    """ChatGLM-6B, ZeRO-3 with both offloads: note of its measured runs."""
    assert host_memory(replace(OFFLOADED, dp=ranks)).observed.bytes / GB == pytest.approx(measured_gb, rel=0.10)


def test_every_rank_that_loads_fp32_weights_holds_them_at_once() -> None:
    """GLM-10B on eight ranks of a node: 445 GB while loading, 21 GB after."""
    setup = Setup(shape=GLM_10B, engine="deepspeed", zero_stage=2, precision="fp16", dp=16, nodes=2)
    memory = host_memory(setup)
    assert memory.binding.name == "loading"
    assert memory.binding.bytes / GB == pytest.approx(445, rel=0.10)


def test_partitioning_while_building_needs_one_model_on_the_node() -> None:
    setup = Setup(shape=GLM_10B, engine="deepspeed", zero_stage=3, precision="fp16", dp=8, zero_init=True)
    without = replace(setup, zero_init=False)
    assert host_memory(setup).instants[0].bytes < host_memory(without).instants[0].bytes / 4


def test_saving_gathers_the_model_on_one_rank() -> None:
    setup = Setup(shape=CPM_9G_8B, engine="bmtrain", zero_stage=3, precision="fp16", dp=8)
    *_, training, saving = host_memory(setup).instants
    assert saving.bytes - training.bytes == 2 * CPM_9G_8B.parameters


def test_only_the_adapters_are_gathered_of_lora() -> None:
    setup = Setup(shape=CPM_9G_8B, engine="bmtrain", zero_stage=3, mode="lora", lora_rank=8, lora_targets=("q",), dp=8)
    *_, training, saving = host_memory(setup).instants
    assert saving.bytes - training.bytes == 2 * setup.trained_parameters
