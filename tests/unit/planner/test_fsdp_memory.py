"""FSDP: what its first implementation and the trainers around it hold, on the GPU and on the host."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpm_cluster.planner.fit import Component
from cpm_cluster.planner.gpu_memory import GpuMemory, gpu_memory, gpu_need
from cpm_cluster.planner.host_memory import SPREAD, host_memory
from cpm_cluster.planner.setup import Setup, Shape

LLAMA_7B = Shape(hidden=4096, layers=32, heads=32, kv_heads=32, ffn=11008, vocab=32000)
N = LLAMA_7B.parameters
FULL = Setup(shape=LLAMA_7B, engine="fsdp", engine_version="torch 2.2", zero_stage=3, precision="bf16", dp=4)
QLORA = replace(
    FULL, mode="qlora", lora_rank=8, lora_targets=("q", "v"), precision="nf4", recompute="full", metric="reserved"
)
OFFLOADED = replace(QLORA, offload_param=True, offload_optimizer=True)
FORWARD = "end of the forward pass"


def parts(memory: GpuMemory, instant: str = FORWARD) -> dict[str, int]:
    found = next(one for one in memory.instants if one.name == instant)
    return {component.name: component.bytes for component in found.components}


def on_the_host(setup: Setup, instant: str) -> dict[str, Component]:
    found = next(one for one in host_memory(setup).instants if one.name == instant)
    return {component.name: component for component in found.components}


class TestAccumulation:
    @pytest.mark.parametrize("trainer", ["transformers 4.30", "trl; accelerate"])
    def test_trainers_of_transformers_keep_whole_gradients_between_micro_batches(self, trainer: str) -> None:
        """accelerate's guide of gradient synchronization: no_sync."""
        held = parts(gpu_need(replace(FULL, engine_version=trainer, grad_accum=8)))
        assert held["gradients not yet reduced"] == 2 * N

    def test_one_micro_batch_is_reduced_at_once(self) -> None:
        held = parts(gpu_need(replace(FULL, engine_version="transformers 4.30")))
        assert "gradients not yet reduced" not in held

    def test_programs_of_their_own_reduce_each_micro_batch(self) -> None:
        assert "gradients not yet reduced" not in parts(gpu_need(replace(FULL, grad_accum=8)))


class TestStreams:
    def test_the_first_fsdp_frees_late_what_recomputation_used(self) -> None:
        held = parts(gpu_memory(QLORA))
        assert held["freed too late"] == held["inputs of the blocks"] == 2 * 2048 * 4096 * 32

    @pytest.mark.parametrize("software", ["torchtitan 2025-06", "torch 2.6.0", "torch 2.10.0"])
    def test_the_second_one_does_not(self, software: str) -> None:
        assert "freed too late" not in parts(gpu_memory(replace(QLORA, engine_version=software)))

    def test_a_card_need_not_have_it(self) -> None:
        """What the allocator has reserved and nothing uses is given back when it must be."""
        assert "freed too late" not in parts(gpu_need(QLORA))

    def test_live_tensors_do_not_show_it(self) -> None:
        assert "freed too late" not in parts(gpu_memory(replace(QLORA, metric="allocated")))


def test_a_shard_is_of_one_type_so_that_nothing_of_a_quantised_model_is_fp32() -> None:
    """trl/trainer/sft_trainer.py, is_sharded_qlora."""
    sharded, alone = (parts(gpu_memory(one)) for one in (QLORA, replace(QLORA, engine="none", zero_stage=0, dp=1)))
    assert alone["inputs of the blocks"] == 2 * sharded["inputs of the blocks"]
    assert alone["embeddings and norms"] == pytest.approx(2 * 4 * sharded["embeddings and norms"], rel=1e-6)


class TestOffloading:
    def test_shards_are_pinned_with_a_gradient_each_trained_or_not(self) -> None:
        """torch/distributed/fsdp/_flat_param.py: a unit's quarter of 114 MB is held in 2^25 bytes."""
        training = on_the_host(OFFLOADED, "training")
        assert training["weights"].bytes == training["gradients"].bytes
        blocks = 4 * 32 * 2**25
        vocabulary = 4 * 2**27
        assert training["weights"].bytes == pytest.approx(blocks + vocabulary, rel=0.01)

    def test_rank_0_alone_reads_the_model(self) -> None:
        two, eight = (on_the_host(replace(OFFLOADED, dp=ranks), "loading") for ranks in (2, 8))
        assert two["weights as they are read"].bytes == eight["weights as they are read"].bytes

    def test_every_rank_does_where_the_model_is_built_first(self) -> None:
        one, all_of_them = (
            on_the_host(replace(OFFLOADED, zero_init=build), "loading")["weights as they are read"].bytes
            for build in (True, False)
        )
        assert all_of_them == pytest.approx(4 * one, abs=8)

    def test_the_whole_model_is_there_while_it_is_sharded(self) -> None:
        loading = on_the_host(OFFLOADED, "loading")
        assert loading["shards of all ranks"].bytes == pytest.approx(
            loading["weights as they are read"].bytes / 1.3, rel=0.05
        )

    def test_a_single_reading_makes_the_interval_wider(self) -> None:
        assert host_memory(OFFLOADED).spread > host_memory(QLORA).spread == SPREAD
