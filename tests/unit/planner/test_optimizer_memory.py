"""Optimizers by the moments that they keep, and what their step takes on top."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpm_cluster.planner.deepspeed_states import SUB_GROUP
from cpm_cluster.planner.gpu_memory import STEP, GpuMemory, Instant, gpu_memory, gpu_need
from cpm_cluster.planner.host_memory import host_memory
from cpm_cluster.planner.setup import Setup, Shape

SHAPE = Shape(hidden=4096, layers=32, heads=32, kv_heads=32, ffn=11008, vocab=32000)
N = SHAPE.parameters
ALONE = Setup(shape=SHAPE, engine="none", precision="bf16_pure")
ZERO_2 = Setup(shape=SHAPE, engine="deepspeed", zero_stage=2, precision="bf16", dp=8)
TRAINER = "deepspeed; transformers"


def step_of(memory: GpuMemory) -> Instant:
    return next(one for one in memory.instants if one.name == STEP)


def moments(setup: Setup) -> int:
    parts = step_of(gpu_memory(setup)).components
    return next(component.bytes for component in parts if component.name.endswith("moments"))


@pytest.mark.parametrize(
    ("optimizer", "bytes_each"),
    [
        ("adamw", 2 * 2),
        ("adamw_8bit", 2),
        ("paged_adamw", 2 * 2),
        ("paged_adamw_8bit", 2),
        ("lion", 2),
        ("lion_8bit", 1),
        ("sgd", 0),
        ("sgd_momentum", 2),
        ("adafactor", 0),
        ("one of another name", 2 * 2),
    ],
)
def test_moments_have_the_type_of_the_weights_or_eight_bits(optimizer: str, bytes_each: int) -> None:
    assert moments(replace(ALONE, optimizer=optimizer)) == bytes_each * N


def test_deepspeed_keeps_a_master_copy_whatever_the_optimizer() -> None:
    parts = {c.name: c.bytes for c in step_of(gpu_memory(replace(ZERO_2, optimizer="sgd"))).components}
    assert parts["master copy and moments"] == pytest.approx(4 * N / 8, abs=8)


def test_moments_on_the_host_are_those_of_the_optimizer() -> None:
    offloaded = replace(ZERO_2, offload_optimizer=True)

    def held(optimizer: str) -> int:
        return host_memory(replace(offloaded, optimizer=optimizer)).instants[1].bytes

    assert held("adamw") - held("lion") == pytest.approx(4 * N, abs=100)


def test_only_adam_takes_square_roots_of_all_tensors_at_once() -> None:
    names = {c.name for c in step_of(gpu_memory(replace(ALONE, optimizer="adafactor"))).components}
    assert "AdamW temporaries" not in names


class TestDeepSpeedsStep:
    def test_gradients_are_laid_flat_before_they_become_fp32(self) -> None:
        """stage_1_and_2.py, step."""
        assert step_of(gpu_need(ZERO_2)).unsure == pytest.approx(2 * N / 8, abs=8)

    def test_a_trainer_that_leaves_adamw_to_torch_may_need_square_roots_too(self) -> None:
        trainer = replace(ZERO_2, engine_version=TRAINER)
        assert step_of(gpu_need(trainer)).unsure == pytest.approx((2 + 4) * N / 8, abs=8)

    def test_stage_3_steps_in_sub_groups(self) -> None:
        stage_3 = replace(ZERO_2, zero_stage=3, dp=2, engine_version=TRAINER)
        assert step_of(gpu_need(stage_3)).unsure == 4 * SUB_GROUP

    def test_on_the_host_nothing_comes_on_top(self) -> None:
        assert step_of(gpu_need(replace(ZERO_2, offload_optimizer=True, engine_version=TRAINER))).unsure == 0
