"""What an engine holds by its version and its program: read in the sources that each test names."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planned_shapes import CHATGLM_6B

from cpm_cluster.planner.demands import in_our_engine
from cpm_cluster.planner.fit import Component
from cpm_cluster.planner.gpu_memory import STEP, GpuMemory, gpu_memory, gpu_need
from cpm_cluster.planner.host_memory import host_memory, power_of_two
from cpm_cluster.planner.setup import Setup, Shape

LLAMA_7B = Shape(hidden=4096, layers=32, heads=32, kv_heads=32, ffn=11008, vocab=32000)
N = LLAMA_7B.parameters
OFFLOADED = Setup(
    shape=LLAMA_7B,
    engine="deepspeed",
    zero_stage=2,
    offload_optimizer=True,
    pin_memory=True,
    precision="bf16",
    recompute="full",
    dp=8,
)
BMTRAIN = Setup(shape=LLAMA_7B, engine="bmtrain", zero_stage=3, precision="fp16", recompute="full", dp=8)


def sizes(memory: GpuMemory, instant: str) -> dict[str, int]:
    found = next(one for one in memory.instants if one.name == instant)
    return {component.name: component.bytes for component in found.components}


def on_the_host(version: str) -> dict[str, Component]:
    training = host_memory(replace(OFFLOADED, engine_version=version)).instants[1]
    return {component.name: component for component in training.components}


class TestDeepSpeed:
    @pytest.mark.parametrize(
        ("version", "returns"),
        [
            ("deepspeed 0.14.0", False),
            ("deepspeed 0.14.1", True),
            ("0.16.9 torch 2.5", True),
            ("deepspeed 0.17.0", False),
        ],
    )
    def test_offloaded_master_weights_come_back_in_fp32(self, version: str, returns: bool) -> None:
        """stage_1_and_2.py, step."""
        step = sizes(gpu_need(replace(OFFLOADED, engine_version=version)), STEP)
        assert step.get("updated weights in fp32", 0) == (round(4 * N / 8) if returns else 0)

    def test_an_unknown_version_is_not_given_the_benefit_of_the_doubt(self) -> None:
        assert "updated weights in fp32" in sizes(gpu_need(OFFLOADED), STEP)

    def test_the_master_copy_is_pinned_since_0_14_1_and_half_weights_wait_on_the_host_since_0_17(self) -> None:
        old, pinned, newest = map(on_the_host, ("deepspeed 0.14.0", "deepspeed 0.16.9", "deepspeed 0.17.0"))
        part = N / 8
        assert old["master copy"].bytes == pytest.approx(8 * 4 * part, abs=8)
        assert pinned["master copy"].bytes == newest["master copy"].bytes == 8 * power_of_two(4 * part)
        assert "weights to be sent" not in pinned
        assert newest["weights to be sent"].bytes == 8 * power_of_two(2 * part)

    @pytest.mark.parametrize(
        ("version", "each"),
        [
            ("deepspeed 0.8.2; transformers 4.26.1", 6),
            ("deepspeed; transformers; torch 2.0", 6),
            ("deepspeed 2023-05; transformers", 6),
            ("deepspeed 0.15.3; transformers 4.46.1", 18),
            ("deepspeed 0.14.2; torch 2.2.0", 18),
        ],
    )
    def test_llama_has_fp32_logits_since_transformers_4_31(self, version: str, each: int) -> None:
        """modeling_llama.py"""
        setup = replace(OFFLOADED, engine_version=version, micro_batch=2)
        logits = sizes(gpu_memory(setup), "end of the forward pass")["logits"]
        assert logits == pytest.approx(each * 2 * 2048 * 32000, rel=0.02)

    def test_other_shapes_keep_them_in_half(self) -> None:
        setup = replace(OFFLOADED, shape=replace(CHATGLM_6B, gated_mlp=False), engine_version="deepspeed 0.14.2")
        logits = sizes(gpu_memory(setup), "end of the forward pass")["logits"]
        assert logits == pytest.approx(6 * 2048 * setup.shape.vocab, rel=0.02)


class TestBMTrain:
    def test_two_blocks_are_there_in_the_backward_pass_with_their_gradients(self) -> None:
        """block_layer.py, release_next_module: the next block is entered before the one before is released."""
        backward = sizes(gpu_need(BMTRAIN), "backward pass of the first block")
        block = LLAMA_7B.parameters_per_layer
        assert backward["two gathered blocks"] == backward["gradients of two blocks"] == 2 * 2 * block

    def test_stage_2_gathers_no_weights_in_the_backward_pass(self) -> None:
        backward = sizes(gpu_need(replace(BMTRAIN, zero_stage=2)), "backward pass of the first block")
        assert backward["weights kept to the backward pass"] == 32 * 2 * LLAMA_7B.parameters_per_layer
        assert "two gathered blocks" not in backward

    def test_only_the_head_is_gathered_for_the_loss_and_has_a_gradient_where_it_is_trained(self) -> None:
        lora = replace(BMTRAIN, mode="lora", lora_rank=8, lora_targets=("q", "v"))
        vocabulary = 32000 * 4096
        trained, frozen = (sizes(gpu_need(one), "end of the forward pass") for one in (BMTRAIN, lora))
        assert trained["the head, gathered, and its gradient"] == 4 * vocabulary
        assert frozen["the head, gathered"] == 2 * vocabulary

    def test_a_frozen_vocabulary_has_no_gradients_but_frozen_blocks_have(self) -> None:
        lora = replace(BMTRAIN, mode="lora", lora_rank=8, lora_targets=("q", "v"))
        found = sizes(gpu_need(lora), STEP)
        assert found["gradients"] == pytest.approx(2 * (N - 2 * 32000 * 4096) / 8, abs=8)

    def test_gradients_stay_from_step_to_step(self) -> None:
        """optim_manager.py, zero_grad(set_to_none=False)."""
        assert sizes(gpu_need(BMTRAIN), "end of the forward pass")["gradients"] == pytest.approx(2 * N / 8, abs=8)

    def test_one_rank_has_a_communicator_too(self) -> None:
        assert "NCCL" in sizes(gpu_need(replace(BMTRAIN, dp=1)), STEP)

    def test_each_tensor_has_pinned_buffers_of_its_own(self) -> None:
        """optim/adam_offload.py: 4096 × 4096 halves are a power of two, 4096 × 11008 and 32000 × 4096 are not."""
        setup = replace(BMTRAIN, dp=1, offload_optimizer=True)
        found = {c.name: c.bytes for c in host_memory(setup).instants[1].components}
        rounded = 32 * (4 * 2**25 + 3 * 2**27) + 2 * 2**28
        assert found["pinned weights and gradients"] == pytest.approx(2 * rounded, rel=0.01)


class TestAdapters:
    def test_the_residual_stream_has_the_type_of_embeddings_that_peft_made_fp32(self) -> None:
        qlora = Setup(
            shape=LLAMA_7B, mode="qlora", lora_rank=8, lora_targets=("q", "v"), precision="nf4", recompute="full"
        )
        inputs = "inputs of the blocks"
        assert sizes(gpu_memory(qlora), "end of the forward pass")[inputs] == 4 * 2048 * 4096 * 32
        litgpt = replace(qlora, engine_version="litgpt")
        assert sizes(gpu_memory(litgpt), "end of the forward pass")[inputs] == 2 * 2048 * 4096 * 32

    def test_fsdp_gathers_the_root_unit_of_adapters_too(self) -> None:
        setup = Setup(shape=LLAMA_7B, mode="qlora", lora_rank=8, lora_targets=("q",), precision="nf4", dp=2)
        found = gpu_memory(replace(setup, engine="fsdp", zero_stage=3))
        assert sizes(found, "end of the forward pass")["gathered embeddings"] == 2 * 2 * 32000 * 4096


class TestOurTorchEngine:
    FSDP = Setup(shape=LLAMA_7B, engine="fsdp", zero_stage=3, precision="bf16", dp=8, micro_batch=2)

    def held(self, setup: Setup) -> dict[str, int]:
        return sizes(in_our_engine(gpu_need(setup), setup), "end of the forward pass")

    def test_all_blocks_share_one_mask_of_packed_rows(self) -> None:
        """training/attention.py: a number in half precision for each pair of positions of each row."""
        for recompute in ("none", "full"):
            found = self.held(replace(self.FSDP, recompute=recompute))
            assert found["mask of packed rows"] == 2 * 2 * 2048**2

    def test_a_kernel_that_is_told_where_documents_begin_needs_no_mask_and_repeats_no_keys(self) -> None:
        grouped = replace(self.FSDP, shape=replace(LLAMA_7B, kv_heads=8), row_masks=False)
        assert not self.held(grouped).keys() & {"mask of packed rows", "keys and values of all heads"}

    def test_grouped_keys_are_saved_for_all_heads(self) -> None:
        grouped = replace(self.FSDP, shape=replace(LLAMA_7B, kv_heads=8), recompute="full")
        assert self.held(grouped)["keys and values of all heads"] == 2 * 2 * (2 * 2048) * (4096 - 1024)
        assert "keys and values of all heads" not in self.held(self.FSDP)


class TestLogits:
    ALONE = Setup(shape=LLAMA_7B, mode="lora", lora_rank=8, lora_targets=("q",), recompute="full")
    PROMPT = Setup(shape=LLAMA_7B, mode="infer", precision="bf16_pure")

    def test_labels_are_shifted_instead_of_logits_since_transformers_4_49(self) -> None:
        """transformers/loss/loss_utils.py: logits, then log-softmax and its gradient in fp32."""
        old, new = (
            sizes(
                gpu_memory(replace(self.ALONE, engine_version=f"transformers 4.{minor}.0")), "end of the forward pass"
            )
            for minor in (48, 49)
        )
        assert new["logits"] == (2 + 4 + 4) * 2048 * 32000 < old["logits"]

    def test_those_of_a_head_that_peft_made_fp32_are_fp32_and_may_be_shifted_by_the_program(self) -> None:
        setup = replace(self.ALONE, mode="qlora", precision="nf4", engine_version="transformers 4.49.0")
        forward = next(one for one in gpu_need(setup).instants if one.name == "end of the forward pass")
        logits = next(component for component in forward.components if component.name == "logits")
        assert logits.bytes == (4 + 4 + 4) * 2048 * 32000
        assert forward.unsure == 4 * 2048 * 32000

    def test_of_a_prompt_one_is_kept_since_transformers_4_45(self) -> None:
        old, new = (
            gpu_need(replace(self.PROMPT, engine_version=f"transformers {version}")).binding.unsure
            for version in ("4.44.2", "4.45.0")
        )
        assert old - new == 6 * 2048 * 32000

    def test_a_prompt_may_go_through_a_block_in_one_piece(self) -> None:
        """Input, norm and output, and three branches of the FFN, each in half precision."""
        new = gpu_need(replace(self.PROMPT, engine_version="transformers 4.45.0")).binding.unsure
        assert new == 2 * 2048 * (3 * 4096 + 3 * 11008)


class TestLitgptInference:
    READ = Setup(shape=LLAMA_7B, mode="infer", precision="bf16_pure", engine_version="litgpt")
    VOCABULARY = 2 * 32000 * 4096

    def test_all_that_is_not_a_block_is_on_the_first_card(self) -> None:
        """generate/sequentially.py"""
        held = gpu_memory(replace(self.READ, pp=4)).binding
        weights = next(component for component in held.components if component.name == "weights")
        assert weights.bytes == pytest.approx(2 * (8 * LLAMA_7B.parameters_per_layer + self.VOCABULARY), rel=1e-3)

    def test_tensor_parallelism_splits_blocks_alone(self) -> None:
        """generate/tp.py"""
        held = gpu_memory(replace(self.READ, tp=4)).binding
        weights = next(component for component in held.components if component.name == "weights")
        assert weights.bytes == pytest.approx(2 * (self.VOCABULARY + (N - self.VOCABULARY) / 4), rel=1e-3)

    def test_a_prompt_is_multiplied_by_unpacked_matrices(self) -> None:
        held = gpu_memory(replace(self.READ, precision="nf4")).binding
        unpacked = {c.name: c.bytes for c in held.components if "dequantised" in c.name}
        assert unpacked == {
            "one matrix, dequantised": 2 * 4096 * 11008,
            "the head, dequantised": self.VOCABULARY,
        }
