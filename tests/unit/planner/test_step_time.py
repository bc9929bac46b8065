"""Step times: what must hold of any of them, and published speeds for orientation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_cluster.planner.accelerators import LINKS, accelerator, packaged_cards
from cpm_cluster.planner.cost import cost
from cpm_cluster.planner.flops import model_flops
from cpm_cluster.planner.setup import Setup, Shape
from cpm_cluster.planner.step_time import StepTime, step_time, tokens_per_second_per_gpu
from cpm_cluster.planner.time_constants import CONSTANTS

GPT_13B = Shape(
    hidden=5120, layers=40, heads=40, kv_heads=40, ffn=20480, vocab=50304, gated_mlp=False, tied_embeddings=True
)
LLAMA_7B = Shape(hidden=4096, layers=32, heads=32, kv_heads=32, ffn=11008, vocab=32000)
MPT_7B = replace(LLAMA_7B, ffn=16384, vocab=50368, gated_mlp=False, tied_embeddings=True)
GPT_175B = replace(GPT_13B, hidden=12288, layers=96, heads=96, kv_heads=96, ffn=49152, vocab=51200)
FSDP = Setup(shape=LLAMA_7B, engine="fsdp", zero_stage=3, gpu="a100-80g", dp=8, micro_batch=2, seq_len=4096)
LORA = replace(FSDP, mode="lora", lora_rank=8, lora_targets=("q", "k", "v", "o"))
MEGATRON = Setup(
    shape=GPT_175B, engine="megatron", zero_stage=1, gpu="a100-80g", tp=8, pp=8, dp=1, nodes=8, grad_accum=64
)


def _seconds(step: StepTime, name: str) -> float:
    return sum(term.seconds for term in step.terms if term.name == name)


class TestTransformersWithoutDeepSpeed:
    """Its code runs kernel by kernel under DDP as in one process, over fp32 weights that autocast casts."""

    DDP = Setup(shape=GPT_13B, engine="ddp", gpu="v100-32g", dp=8, precision="fp16", seq_len=1024)

    def times(self, version: str) -> dict[str, float]:
        return {term.name: term.seconds for term in step_time(replace(self.DDP, engine_version=version)).terms}

    def test_activations_pass_through_memory_more_often_than_those_of_leaner_code(self) -> None:
        through = "activations through memory"
        assert self.times("transformers 4.12.0")[through] > 1.5 * self.times("")[through]

    def test_its_optimizer_reads_and_writes_for_each_operation(self) -> None:
        """Ten passes over what a fused kernel reads and writes in three."""
        assert self.times("transformers 4.12.0")["optimizer"] == pytest.approx(100 / 30 * self.times("")["optimizer"])

    def test_gradients_of_fp32_weights_are_reduced_in_fp32(self) -> None:
        amp, half = (
            _seconds(step_time(replace(self.DDP, precision=precision, nodes=8)), "gradients")
            for precision in ("fp16", "fp16_pure")
        )
        assert amp > 1.4 * half


class TestPublished:
    """Within 20 % of what others measured, none of whose configurations has a constant of its own."""

    def test_mpt_7b_on_eight_a100_trains_4641_tokens_a_second_for_each(self) -> None:
        """llm-foundry, scripts/train/benchmarking: 2048 tokens, micro batch 6, no recomputation, MFU 64 %."""
        setup = replace(FSDP, shape=MPT_7B, micro_batch=6, grad_accum=2, seq_len=2048)
        assert tokens_per_second_per_gpu(setup) == pytest.approx(4641, rel=0.2)
        assert step_time(setup).mfu == pytest.approx(0.64, rel=0.2)

    def test_mpt_7b_on_eight_h100_trains_10643(self) -> None:
        setup = replace(FSDP, shape=MPT_7B, micro_batch=6, seq_len=2048, gpu="h100-80g")
        assert tokens_per_second_per_gpu(setup) == pytest.approx(10643, rel=0.2)

    def test_gpt_175b_in_a_pipeline_of_eight_reaches_51_percent_mfu(self) -> None:
        """Korthikanti et al. 2022, table 5: 64 A100, sequence parallel, selective recomputation."""
        setup = replace(MEGATRON, recompute="selective", sequence_parallel=True, flash_attention=False)
        assert step_time(setup).mfu == pytest.approx(0.514, rel=0.2)

    def test_lora_of_qwen_7b_on_one_a100_trains_3150(self) -> None:
        """QwenLM/Qwen, README: 2048 tokens, micro batch 1, rank 64, all matrices, recomputation."""
        shape = replace(LLAMA_7B, vocab=151936)
        setup = Setup(
            shape=shape,
            mode="lora",
            lora_rank=64,
            lora_targets=("qkv", "o", "gate", "up", "down"),
            recompute="full",
            grad_accum=8,
            gpu="a100-80g",
        )
        assert tokens_per_second_per_gpu(setup) == pytest.approx(3150, rel=0.2)


class TestFlops:
    def test_a_token_costs_six_for_each_parameter_and_twelve_for_attention(self) -> None:
        """Chowdhery et al. 2022, appendix B, here without the embedding, which is looked up."""
        shape = LLAMA_7B
        parameters = shape.layers * shape.linear_parameters_per_layer + shape.embedding_parameters
        assert model_flops(FSDP) == 6 * parameters + 12 * shape.layers * shape.hidden * 4096

    def test_what_is_computed_again_is_no_use_of_the_model(self) -> None:
        assert model_flops(replace(FSDP, recompute="full")) == model_flops(FSDP)

    def test_frozen_weights_need_no_gradients_of_their_own(self) -> None:
        assert model_flops(LORA) / model_flops(FSDP) == pytest.approx(2 / 3, abs=0.05)

    def test_a_forward_pass_is_a_third_of_a_step(self) -> None:
        assert model_flops(replace(FSDP, mode="infer")) * 3 == pytest.approx(model_flops(FSDP))


class TestStep:
    def test_its_terms_add_up_and_say_where_they_are_from(self) -> None:
        step = step_time(MEGATRON)
        assert step.seconds == pytest.approx(sum(term.seconds for term in step.terms))
        assert all(term.seconds > 0 and term.formula and term.source for term in step.terms)
        assert step.low < step.seconds < step.high

    def test_recomputation_costs_about_a_third_more(self) -> None:
        ratio = step_time(replace(FSDP, recompute="full")).seconds / step_time(FSDP).seconds
        assert ratio == pytest.approx(4 / 3, abs=0.06)

    def test_accumulation_repeats_the_micro_step_alone(self) -> None:
        one, four = step_time(FSDP), step_time(replace(FSDP, grad_accum=4))
        assert 3 * one.seconds < four.seconds < 4 * one.seconds

    def test_a_pipeline_wastes_the_less_the_more_micro_batches_fill_it(self) -> None:
        few, many = step_time(replace(MEGATRON, grad_accum=8)), step_time(MEGATRON)
        assert _seconds(few, "pipeline bubble") / few.seconds > 0.35
        assert _seconds(many, "pipeline bubble") / many.seconds < 0.11

    def test_interleaving_shrinks_the_bubble(self) -> None:
        plain, interleaved = step_time(MEGATRON), step_time(replace(MEGATRON, virtual_stages=4))
        assert _seconds(interleaved, "pipeline bubble") < _seconds(plain, "pipeline bubble") / 3

    def test_tensor_parallelism_over_two_nodes_is_much_slower_than_within_one(self) -> None:
        within = Setup(shape=GPT_13B, engine="megatron", gpu="v100-32g", tp=8, flash_attention=False)
        across = replace(within, nodes=2)
        assert _seconds(step_time(across), "tensor parallel") > 3 * _seconds(step_time(within), "tensor parallel")

    def test_small_micro_batches_leave_zero_3_waiting_for_its_weights(self) -> None:
        small = replace(FSDP, micro_batch=1, seq_len=512, dp=64, nodes=8)
        large = replace(small, micro_batch=32)
        shares = [_seconds(step, "sharded weights") / step.seconds for step in map(step_time, (small, large))]
        assert shares[0] > 5 * shares[1]

    def test_sharding_within_a_node_keeps_the_gathers_off_the_network(self) -> None:
        everywhere = replace(FSDP, micro_batch=1, seq_len=512, dp=64, nodes=8, gpu="v100-32g")
        within = replace(everywhere, shard_within_node=True)
        assert step_time(within).seconds < step_time(everywhere).seconds

    def test_short_samples_wait_for_the_cpu(self) -> None:
        short = replace(LORA, engine="none", zero_stage=0, dp=1, micro_batch=1, seq_len=128)
        assert _seconds(step_time(short), "waiting for kernel launches") > 0.5 * step_time(short).seconds
        assert _seconds(step_time(replace(short, seq_len=8192)), "waiting for kernel launches") == 0

    def test_heads_that_are_no_multiple_of_eight_are_slow(self) -> None:
        """BigScience, chronicles-prequel: 13824 wide, 128 heads of 108 against 96 of 144, 74 against 102 tokens/s."""
        shape = replace(GPT_175B, hidden=13824, ffn=4 * 13824, layers=78, heads=96, kv_heads=96)
        aligned = replace(MEGATRON, shape=shape, tp=4, pp=12, flash_attention=False, recompute="full")
        other = replace(aligned, shape=replace(shape, heads=128, kv_heads=128))
        ratio = tokens_per_second_per_gpu(other) / tokens_per_second_per_gpu(aligned)
        assert ratio == pytest.approx(74 / 102, abs=0.1)

    def test_nf4_is_unpacked_by_one_kernel_where_gptq_takes_several(self) -> None:
        """bitsandbytes: a copy is written once, and read by the product. torchao's NF4 is written in torch."""
        nf4 = replace(FSDP, mode="qlora", lora_rank=8, lora_targets=("q", "v"), precision="nf4")
        of_nf4, of_gptq, of_torchao = (
            _seconds(step_time(one), "weights through memory")
            for one in (nf4, replace(nf4, precision="int4_gptq"), replace(nf4, engine_version="torchtune 0.6"))
        )
        assert of_nf4 < of_gptq / 2 and of_torchao == of_gptq

    def test_layers_placed_on_several_cards_take_turns(self) -> None:
        one = replace(FSDP, engine="none", zero_stage=0, dp=1)
        assert step_time(replace(one, pp=2)).seconds == pytest.approx(step_time(one).seconds, rel=0.05)

    def test_an_offloaded_optimizer_takes_host_time_and_widens_the_interval(self) -> None:
        offloaded = step_time(replace(FSDP, engine="deepspeed", zero_stage=2, offload_optimizer=True))
        assert _seconds(offloaded, "optimizer on the CPU") > 1
        assert offloaded.spread > step_time(FSDP).spread

    def test_offloaded_weights_are_streamed_for_each_micro_step(self) -> None:
        setup = replace(FSDP, engine="deepspeed", offload_param=True, dp=1, micro_batch=1)
        one, two = step_time(setup), step_time(replace(setup, grad_accum=2))
        assert _seconds(two, "weights from the host") == pytest.approx(2 * _seconds(one, "weights from the host"))

    def test_bmtrain_before_1_0_always_recomputes(self) -> None:
        old = replace(FSDP, engine="bmtrain", engine_version="0.2.3.post2")
        assert tokens_per_second_per_gpu(old) < 0.8 * tokens_per_second_per_gpu(replace(old, engine_version="1.0.1"))

    def test_accumulation_that_nobody_states_is_taken_as_usual(self) -> None:
        unstated = replace(MEGATRON, grad_accum=1, grad_accum_stated=False)
        assert step_time(unstated).mfu == pytest.approx(step_time(MEGATRON).mfu)

    def test_samples_of_different_lengths_cost_their_mean(self) -> None:
        ragged = replace(FSDP, mean_tokens=1024)
        assert step_time(ragged).seconds == pytest.approx(step_time(replace(FSDP, seq_len=1024)).seconds)


SETUPS = st.builds(
    lambda shape, engine, recompute, micro, accum, seq, nodes, gpu: Setup(
        shape=shape,
        engine=engine,
        zero_stage=1 if engine == "megatron" else 3,
        recompute=recompute,
        micro_batch=micro,
        grad_accum=accum,
        seq_len=seq,
        dp=8 * nodes,
        nodes=nodes,
        gpu=gpu,
    ),
    st.sampled_from([LLAMA_7B, MPT_7B, GPT_13B]),
    st.sampled_from(["fsdp", "deepspeed", "megatron", "bmtrain"]),
    st.sampled_from(["none", "full"]),
    st.integers(1, 64),
    st.integers(1, 32),
    st.sampled_from([128, 1024, 8192, 131072]),
    st.sampled_from([1, 2, 16]),
    st.sampled_from(sorted(LINKS)),
)


class TestAnySetup:
    @given(SETUPS)
    def test_more_work_never_takes_less_time(self, setup: Setup) -> None:
        now = step_time(setup).seconds
        for more in (
            replace(setup, micro_batch=setup.micro_batch + 1),
            replace(setup, grad_accum=setup.grad_accum + 1),
            replace(setup, seq_len=setup.seq_len * 2),
            replace(setup, shape=replace(setup.shape, layers=setup.shape.layers + 1)),
            replace(setup, recompute="full"),
        ):
            assert step_time(more).seconds >= now * (1 - 1e-12)

    @given(SETUPS)
    def test_a_larger_micro_batch_never_lowers_the_speed(self, setup: Setup) -> None:
        larger = replace(setup, micro_batch=2 * setup.micro_batch)
        assert tokens_per_second_per_gpu(larger) >= tokens_per_second_per_gpu(setup) * 0.9999

    @given(SETUPS)
    def test_more_nodes_never_make_each_gpu_faster(self, setup: Setup) -> None:
        """Apart from the optimizer, of which each has a smaller part."""
        twice = replace(setup, dp=2 * setup.dp, nodes=2 * setup.nodes)
        steps = [step_time(each) for each in (setup, twice)]
        one, two = (step.seconds - _seconds(step, "optimizer") for step in steps)
        assert two >= one * 0.9999

    @given(SETUPS)
    def test_no_prediction_is_faster_than_anything_ever_seen(self, setup: Setup) -> None:
        step = step_time(setup)
        assert step.credible
        assert step.mfu > 0

    @given(SETUPS)
    def test_adapters_are_never_slower_than_training_everything(self, setup: Setup) -> None:
        adapters = replace(setup, mode="lora", lora_rank=8, lora_targets=("q", "v"))
        assert step_time(adapters).seconds <= step_time(setup).seconds


class TestCards:
    def test_every_card_of_the_catalogue_has_links(self) -> None:
        assert set(packaged_cards()) == set(LINKS)

    def test_an_unknown_card_is_planned_with_a_wider_interval(self) -> None:
        unknown = step_time(replace(FSDP, gpu="b9000-1t"))
        assert unknown.spread > step_time(FSDP).spread

    def test_a_card_of_your_own_catalogue_is_planned_by_its_peak(self) -> None:
        own = replace(packaged_cards()["a100-80g"], peak_fp16_tflops=624, peak_bf16_tflops=624)
        faster = step_time(replace(FSDP, gpu="mine"), own)
        assert faster.seconds < step_time(FSDP).seconds
        assert faster.spread > step_time(FSDP).spread

    def test_fp8_helps_where_there_is_fp8(self) -> None:
        gain = [
            tokens_per_second_per_gpu(replace(FSDP, gpu=gpu, precision="fp8"))
            / tokens_per_second_per_gpu(replace(FSDP, gpu=gpu))
            for gpu in ("a100-80g", "h100-80g")
        ]
        assert gain[0] == pytest.approx(1)
        assert 1.1 < gain[1] < 2

    def test_a_p40_is_planned_in_fp32(self) -> None:
        assert accelerator("p40-24g").peak("fp16") == pytest.approx(11.5e12, rel=0.01)

    def test_efficiencies_are_shares_of_a_peak(self) -> None:
        for share in (CONSTANTS.linear_volta, CONSTANTS.linear_ampere, CONSTANTS.linear_hopper, CONSTANTS.overlap):
            assert 0 < share < 1


class TestCost:
    STEP = step_time(FSDP)

    def test_steps_become_gpu_hours_money_and_energy(self) -> None:
        spent = cost(FSDP, self.STEP, steps=1000)
        assert spent.seconds.value == pytest.approx(1000 * self.STEP.seconds)
        assert spent.gpu_hours.value == pytest.approx(8 * spent.seconds.value / 3600)
        assert spent.price_usd is not None
        assert spent.price_usd.value == pytest.approx(3.43 * spent.gpu_hours.value)
        assert spent.energy_kwh.value == pytest.approx(0.4 * 1.59 * spent.gpu_hours.value)
        assert spent.price_usd.low < spent.price_usd.value < spent.price_usd.high

    def test_the_clusters_own_price_goes_first(self) -> None:
        spent = cost(FSDP, self.STEP, steps=10, cluster_price_usd=1.0)
        assert spent.price_usd is not None
        assert spent.price_usd.value == pytest.approx(spent.gpu_hours.value)
        assert "own" in spent.price_source

    def test_without_a_price_it_says_which_key_states_one(self) -> None:
        for gpu in ("a800-80g", "b9000-1t"):
            spent = cost(replace(FSDP, gpu=gpu), self.STEP, steps=10)
            assert spent.price_usd is None
            assert "gpu_price_per_hour_usd" in spent.price_source

    def test_tokens_a_day_are_those_of_all_gpus(self) -> None:
        assert self.STEP.tokens_per_day == pytest.approx(self.STEP.tokens_per_second_per_gpu * 8 * 86_400)
