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
    PURE = replace(OFFLOADED, offload_optimizer=False, zero_stage=3, precision="bf16_pure")

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

    def test_a_version_is_read_however_the_name_is_spelt(self) -> None:
        old = replace(OFFLOADED, engine_version="Megatron-LM v1.1.5 with DeepSpeed 0.3")
        assert "updated weights in fp32" not in sizes(gpu_need(old), STEP)

    def test_without_sharding_fp32_gradients_are_there_twice_while_they_are_laid_flat(self) -> None:
        """runtime/fp16/fused_optimizer.py, step."""
        step = sizes(gpu_need(replace(OFFLOADED, offload_optimizer=False, zero_stage=0, precision="fp16")), STEP)
        assert step["fp32 gradients"] == step["fp32 gradients before they are flat"] == 4 * N

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_pure_half_precision_is_ten_bytes_for_each_parameter(self, stage: int) -> None:
        """bf16_master_weights_and_grads and bf16_optimizer_states: weights, master copy, two moments, gradient."""
        one = replace(self.PURE, dp=1, zero_stage=stage, engine_version="deepspeed 0.18.3")
        step = sizes(gpu_need(one), STEP)
        held = sum(step[name] for name in ("trained weights", "master copy and moments", "gradients"))
        assert held == pytest.approx(10 * N, rel=1e-6)
        assert "flat gradients" in step

    def test_a_program_may_call_itself_pure_whose_deepspeed_keeps_fp32_states(self) -> None:
        """bf16_master_weights_and_grads came with 0.18.3; LLaMA-Factory's pure_bf16 only loads weights so."""
        old, unknown, new = (
            gpu_need(replace(self.PURE, engine_version=version))
            for version in ("deepspeed 0.18.2", "deepspeed", "deepspeed 0.18.3")
        )
        assert sizes(old, STEP)["master copy and moments"] == pytest.approx(12 * N / 8, abs=8)
        assert sizes(unknown, STEP) == sizes(new, STEP)
        assert unknown.high - new.high == pytest.approx(6 * N / 8, abs=8)

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

    def test_a_card_of_several_holds_one_matrix_of_the_vocabulary_beside_its_quantised_blocks(self) -> None:
        served = Setup(shape=LLAMA_7B, mode="infer", precision="nf4", pp=4)
        found = sizes(gpu_need(served), "decoding, last card")
        linear = 8 * LLAMA_7B.linear_parameters_per_layer
        assert found["nf4 weights"] == pytest.approx((0.5 + 4 / 64) * linear, rel=1e-4)
        assert found["embeddings and norms"] == pytest.approx(2 * 32000 * 4096, rel=0.001)

    def test_axolotl_casts_embeddings_back_to_half(self) -> None:
        """axolotl/loaders/model.py, needs_fa2_dtype."""
        qlora = Setup(shape=LLAMA_7B, mode="qlora", lora_rank=8, lora_targets=("q",), precision="nf4")
        trl, axolotl = (sizes(gpu_need(replace(qlora, engine_version=v)), STEP) for v in ("trl", "axolotl"))
        assert trl["embeddings and norms"] == 2 * axolotl["embeddings and norms"]

    def test_fsdp_gathers_the_root_unit_of_adapters_too(self) -> None:
        setup = Setup(shape=LLAMA_7B, mode="qlora", lora_rank=8, lora_targets=("q",), precision="nf4", dp=2)
        found = gpu_memory(replace(setup, engine="fsdp", zero_stage=3))
        assert sizes(found, "end of the forward pass")["gathered embeddings"] == 2 * 2 * 32000 * 4096


class TestOurTorchEngine:
    FSDP = Setup(shape=LLAMA_7B, engine="fsdp", zero_stage=3, precision="bf16", dp=8, micro_batch=2)

    def held(self, setup: Setup) -> dict[str, int]:
        return sizes(in_our_engine(gpu_need(setup), setup), "end of the forward pass")

    def test_all_blocks_share_one_mask_of_packed_rows(self) -> None:
        """training/model/attention.py: a number in half precision for each pair of positions of each row."""
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

    def test_a_prompt_may_go_through_a_block_in_one_piece(self) -> None:
        """Input, norm and output, and three branches of the FFN, each in half precision."""
        new = gpu_need(replace(self.PROMPT, engine_version="transformers 4.45.0")).binding.unsure
        assert new == 2 * 2048 * (3 * 4096 + 3 * 11008)

    def test_a_kernel_that_goes_tile_by_tile_has_none(self) -> None:
        """Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary Language Models."""
        forward = sizes(gpu_memory(replace(self.ALONE, cut_cross_entropy=True)), "end of the forward pass")
        assert "logits" not in forward


class TestGeneration:
    """generation/utils.py and models/llama/modeling_llama.py of the versions named; 2 prompts of 2048 tokens."""

    READ = Setup(shape=LLAMA_7B, mode="infer", precision="bf16_pure", micro_batch=2)
    ALL_LOGITS = 2 * 2048 * 32000

    def held(self, version: str, instant: str, flash: bool = True) -> dict[str, int]:
        setup = replace(self.READ, engine_version=f"transformers {version}", flash_attention=flash)
        return sizes(gpu_need(setup), instant)

    def test_before_4_45_logits_of_the_whole_prompt_were_made_and_copied_to_fp32(self) -> None:
        assert self.held("4.44.2", "decoding")["logits of the prompt"] == (2 + 4) * self.ALL_LOGITS
        assert "logits of the prompt" not in self.held("4.45.0", "decoding")

    def test_before_4_31_they_stayed_in_half(self) -> None:
        assert self.held("4.30.2", "decoding")["logits of the prompt"] == 2 * self.ALL_LOGITS

    def test_before_4_36_a_step_held_the_cache_of_the_step_before_and_all_fp32_logits(self) -> None:
        second = self.held("4.35.2", "the step after the prompt")
        assert second["the cache before this step"] == second["key/value cache"] == 4 * 32 * 4096 * 2 * 2048
        assert second["logits of the prompt"] == 4 * self.ALL_LOGITS

    def test_without_flash_attention_a_block_holds_scores_in_half_as_an_fp32_softmax_and_cast_back(self) -> None:
        block = "a block of the prompt"
        fused, eager = (self.held("4.35.2", block, flash)["one block of the prompt"] for flash in (True, False))
        scores = 2 * 32 * 2048**2
        assert eager - 8 * scores == pytest.approx(2 * 2 * 2048 * 5 * 4096)
        assert fused == 2 * 2 * 2048 * (3 * 4096 + 3 * 11008)

    def test_an_unknown_version_may_do_as_the_old_ones(self) -> None:
        unknown, new = (
            gpu_need(replace(self.READ, engine_version=version)).binding.unsure
            for version in ("transformers", "transformers 4.45.0")
        )
        assert unknown - new == 6 * self.ALL_LOGITS


class TestEagerAttention:
    """2 × 1024 tokens of a single block that is recomputed."""

    LORA = Setup(
        shape=replace(LLAMA_7B, layers=1),
        mode="lora",
        lora_rank=8,
        lora_targets=("q",),
        precision="fp16",
        recompute="full",
        flash_attention=False,
        micro_batch=2,
        seq_len=1024,
    )
    SCORES = 2 * 32 * 1024**2

    def block(self, setup: Setup) -> dict[str, int]:
        return sizes(gpu_need(setup), "backward pass of the first block")

    def saved(self, setup: Setup) -> int:
        eager, flash = (self.block(replace(setup, flash_attention=flash))["one block"] for flash in (False, True))
        return eager - flash

    def test_llama_keeps_an_fp32_softmax_and_its_cast_and_has_no_dropout(self) -> None:
        """modeling_llama.py: softmax(…, dtype=torch.float32).to(query_states.dtype)."""
        assert self.saved(replace(self.LORA, engine_version="transformers 4.31.0")) == 6 * self.SCORES

    def test_other_code_keeps_softmax_dropouts_mask_and_its_result_in_half(self) -> None:
        assert self.saved(self.LORA) == 5 * self.SCORES

    def test_bert_under_autocast_keeps_the_softmax_in_fp32(self) -> None:
        shape = replace(self.LORA.shape, kind="bert", gated_mlp=False)
        assert self.saved(replace(self.LORA, mode="full", shape=shape)) == 7 * self.SCORES

    def test_its_backward_pass_holds_gradients_of_the_scores_before_and_after_the_softmax(self) -> None:
        old = replace(self.LORA, engine_version="transformers 4.31.0", seq_len=4096)
        grown = self.block(replace(old, seq_len=8192))["gradients of scores"] - self.block(old)["gradients of scores"]
        ffn = 3 * 2 * 11008 * 2 * 4096  # what it kept is gone by then
        assert grown == pytest.approx((2 + 4) * 2 * 32 * (8192**2 - 4096**2) - ffn, abs=2)


class TestTorchBeforeTwo:
    ALONE = Setup(shape=LLAMA_7B, precision="fp16")

    @pytest.mark.parametrize(
        ("version", "kept"),
        [("transformers 4.26.1", True), ("torch 1.13", True), ("apex", True), ("torch 2.1", False), ("", False)],
    )
    def test_zero_grad_left_gradients_where_they_were(self, version: str, kept: bool) -> None:
        """torch/nn/modules/module.py, zero_grad(set_to_none=False)."""
        forward = sizes(gpu_need(replace(self.ALONE, engine_version=version)), "end of the forward pass")
        assert ("gradients" in forward) == kept


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
