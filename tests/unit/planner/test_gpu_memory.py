"""GPU memory: the sizes of known parts, what must hold for any setup, and the seed's hardware tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_cluster.planner.gpu_memory import STAGING, GpuMemory, gpu_memory, gpu_need
from cpm_cluster.planner.memory_constants import MIB
from cpm_cluster.planner.setup import Setup, Shape

GB, GIB = 10**9, 1 << 30
A100_80 = 81251
CPM_9G_8B = Shape(hidden=4096, layers=32, heads=32, kv_heads=32, ffn=14336, vocab=119696)
CPM_9G_100B = Shape(hidden=10240, layers=80, heads=80, kv_heads=80, ffn=26112, vocab=119696)
LLAMA_7B = Shape(hidden=4096, layers=32, heads=32, kv_heads=32, ffn=11008, vocab=32000)
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
CPM_9G_TARGETS = ("q", "k", "v", "gate", "up", "down")
BMTRAIN = Setup(
    shape=CPM_9G_8B,
    engine="bmtrain",
    engine_version="bmtrain 0.2.3.post2",
    zero_stage=3,
    precision="fp16",
    seq_len=4096,
    recompute="full",
    pin_memory=True,
    gpu_memory_mib=A100_80,
)


def size_of(memory: GpuMemory, name: str) -> int:
    """Bytes of the parts of that name in the binding instant."""
    return sum(component.bytes for component in memory.binding.components if component.name == name)


shapes = st.builds(
    lambda heads, size, layers, ffn, vocab, gated, tied: Shape(
        hidden=heads * size,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        ffn=ffn * 64,
        vocab=vocab * 128,
        gated_mlp=gated,
        tied_embeddings=tied,
    ),
    st.integers(4, 64),
    st.sampled_from((64, 128)),
    st.integers(2, 96),
    st.integers(8, 400),
    st.integers(100, 2000),
    st.booleans(),
    st.booleans(),
)


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    mode = draw(st.sampled_from(("full", "lora", "qlora")))
    adapters = {"lora_rank": draw(st.integers(1, 128)), "lora_targets": ("q", "v", "up")} if mode != "full" else {}
    return Setup(
        shape=draw(shapes),
        mode=mode,
        engine=draw(st.sampled_from(("deepspeed", "fsdp", "bmtrain", "none", "ddp"))),
        zero_stage=draw(st.integers(0, 3)),
        offload_optimizer=draw(st.booleans()),
        overlap_comm=draw(st.booleans()),
        precision="nf4" if mode == "qlora" else draw(st.sampled_from(("fp32", "fp16", "bf16", "bf16_pure"))),
        micro_batch=draw(st.integers(1, 16)),
        grad_accum=draw(st.integers(1, 8)),
        seq_len=draw(st.integers(16, 8192)),
        recompute=draw(st.sampled_from(("none", "full"))),
        flash_attention=draw(st.booleans()),
        dp=draw(st.sampled_from((2, 4, 8))),
        metric=draw(st.sampled_from(("allocated", "reserved", "nvml"))),
        **adapters,
    )


class TestAnySetup:
    @given(setups(), st.sampled_from((2, 3, 4, 16)))
    def test_more_ranks_of_zero_3_never_need_more_on_a_gpu(self, setup: Setup, times: int) -> None:
        setup = replace(setup, engine="deepspeed" if setup.engine in ("none", "ddp") else setup.engine, zero_stage=3)
        more = replace(setup, dp=setup.dp * times)
        assert gpu_need(more).binding.bytes <= gpu_need(setup).binding.bytes
        assert gpu_memory(more).binding.bytes <= gpu_memory(setup).binding.bytes

    @given(setups(), st.integers(1, 16))
    def test_a_larger_micro_batch_never_needs_less(self, setup: Setup, more: int) -> None:
        larger = replace(setup, micro_batch=setup.micro_batch + more)
        assert gpu_memory(larger).binding.bytes >= gpu_memory(setup).binding.bytes

    @given(setups(), st.integers(1, 8192))
    def test_longer_samples_never_need_less(self, setup: Setup, more: int) -> None:
        longer = replace(setup, seq_len=setup.seq_len + more)
        assert gpu_memory(longer).binding.bytes >= gpu_memory(setup).binding.bytes

    @given(setups())
    def test_recomputation_never_needs_more(self, setup: Setup) -> None:
        kept, recomputed = (gpu_memory(replace(setup, recompute=kind)) for kind in ("none", "full"))
        assert recomputed.binding.bytes <= kept.binding.bytes

    @given(setups())
    def test_accumulation_never_needs_less_than_none(self, setup: Setup) -> None:
        one, two = (gpu_memory(replace(setup, grad_accum=count)) for count in (1, 2))
        assert two.binding.bytes >= one.binding.bytes

    @given(setups())
    def test_the_parts_of_the_binding_instant_are_its_total_and_each_says_where_it_is_from(self, setup: Setup) -> None:
        memory = gpu_memory(setup)
        binding = memory.binding
        assert binding.bytes == sum(component.bytes for component in binding.components)
        assert binding.bytes == max(instant.bytes for instant in memory.instants)
        assert all(part.bytes >= 0 and part.formula and part.source for part in binding.components)

    @given(setups())
    def test_the_interval_holds_the_estimate(self, setup: Setup) -> None:
        memory = gpu_need(setup)
        assert memory.low <= memory.binding.bytes <= memory.high

    @given(setups())
    def test_what_is_live_is_less_than_what_is_reserved_and_that_less_than_what_the_card_shows(
        self, setup: Setup
    ) -> None:
        live, reserved, shown = (
            gpu_memory(replace(setup, metric=metric)).binding.bytes for metric in ("allocated", "reserved", "nvml")
        )
        assert live <= reserved < shown


class TestStates:
    """Bytes for each parameter in the optimizer step or wherever the states are whole."""

    @pytest.mark.parametrize(
        ("setup", "bytes_each"),
        [
            (Setup(shape=LLAMA_7B, precision="fp32"), 16),  # 4 weights + 4 gradients + 8 moments
            (Setup(shape=LLAMA_7B, precision="bf16_pure"), 8),
            (Setup(shape=LLAMA_7B, precision="bf16_pure", optimizer="adamw_8bit"), 6),
            (Setup(shape=LLAMA_7B, engine="deepspeed", zero_stage=3, dp=8, precision="bf16"), 16 / 8),
            (Setup(shape=LLAMA_7B, engine="deepspeed", zero_stage=1, dp=8, precision="fp16"), 2 + 2 + 12 / 8),
            (Setup(shape=LLAMA_7B, engine="fsdp", zero_stage=3, dp=8, precision="bf16"), 16 / 8),
            (Setup(shape=LLAMA_7B, engine="bmtrain", zero_stage=3, dp=8, precision="fp16"), 14 / 8),
            (Setup(shape=LLAMA_7B, engine="bmtrain", zero_stage=3, dp=8, precision="bf16"), 16 / 8),
            (Setup(shape=LLAMA_7B, engine="bmtrain", zero_stage=3, dp=8, offload_optimizer=True), 4 / 8),
        ],
    )
    def test_weights_gradients_and_optimizer(self, setup: Setup, bytes_each: float) -> None:
        memory = gpu_memory(replace(setup, metric="allocated", micro_batch=1, seq_len=16, grad_accum=2))
        step = memory.instants[-1]
        passing = ("AdamW temp", "fp32 grad", "reduce bucket")
        kept = sum(part.bytes for part in step.lasting if not part.name.startswith(passing))
        assert kept == pytest.approx(bytes_each * LLAMA_7B.parameters, rel=1e-6)

    def test_the_bucket_of_zero_2_costs_two_bytes_an_element(self) -> None:
        """As read from one model at 2e8, 5e8 and 5e9 elements: +572 MiB and +8584 MiB."""
        small, large = (
            gpu_memory(
                Setup(shape=LLAMA_7B, engine="deepspeed", zero_stage=2, dp=3, precision="fp16", bucket_elements=size)
            )
            for size in (200_000_000, 500_000_000)
        )
        assert (large.binding.bytes - small.binding.bytes) / MIB == pytest.approx(572, abs=1)

    def test_lora_has_no_gradients_or_moments_for_frozen_weights(self) -> None:
        setup = Setup(shape=LLAMA_7B, mode="lora", lora_rank=8, lora_targets=("q", "v"), precision="bf16")
        memory = gpu_memory(setup)
        assert size_of(memory, "frozen weights") == 2 * LLAMA_7B.parameters
        assert setup.trained_parameters == 4_194_304  # 32 × 8 × 2 × (4096 + 4096)
        assert size_of(memory, "gradients") <= 4 * setup.trained_parameters

    def test_whole_new_embeddings_are_not_cheap(self) -> None:
        """Qwen-7B: 20 to 34 GB with trained embedding and head."""
        qwen = replace(LLAMA_7B, vocab=151936)
        targets = ("qkv", "o", "gate", "up", "down")
        plain = Setup(shape=qwen, mode="lora", lora_rank=64, lora_targets=targets, seq_len=512, recompute="full")
        whole = replace(plain, lora_targets=(*targets, "embed_full", "head_full"))
        assert 10 * GB < gpu_memory(whole).binding.bytes - gpu_memory(plain).binding.bytes < 16 * GB


class TestInstants:
    def test_zero_3_without_zero_init_holds_the_whole_model_once(self) -> None:
        """GLM-10B ran out of memory on 16 GB cards, whatever the buckets and with 1, 2, 4 or 6 GPUs."""
        setup = Setup(shape=GLM_10B, engine="deepspeed", zero_stage=3, precision="fp16", offload_optimizer=True)
        setup = replace(setup, offload_param=True, seq_len=512, recompute="full", zero_init=False)
        for gpus in (1, 2, 4, 6):
            memory = gpu_need(replace(setup, dp=gpus))
            assert memory.binding.name == STAGING
            assert memory.verdict(16160) == "does not fit"

    def test_nvidia_smi_in_training_does_not_see_the_start(self) -> None:
        setup = Setup(shape=GLM_10B, engine="deepspeed", zero_stage=3, precision="fp16", zero_init=False, dp=64)
        assert gpu_memory(setup).observed.name != STAGING

    def test_a_full_recompute_moves_the_peak_to_the_logits(self) -> None:
        setup = Setup(
            shape=replace(LLAMA_7B, vocab=151936), mode="lora", lora_rank=8, lora_targets=("q",), seq_len=8192
        )
        memory = gpu_memory(replace(setup, recompute="full"))
        assert memory.binding.name == "end of the forward pass"
        assert size_of(memory, "logits") > 10 * GIB

    def test_the_first_stage_of_a_pipeline_holds_a_micro_batch_for_each_stage(self) -> None:
        gpt = Shape(hidden=14336, layers=72, heads=64, kv_heads=64, ffn=57344, vocab=250880, gated_mlp=False)
        setup = Setup(shape=replace(gpt, tied_embeddings=True), engine="megatron", zero_stage=1, precision="fp16")
        setup = replace(setup, tp=8, pp=12, dp=4, nodes=48, grad_accum=256, recompute="full", flash_attention=False)
        memory = gpu_memory(setup)
        assert memory.binding.name == "backward pass of the last block, first stage"
        assert size_of(memory, "inputs of the blocks") == 12 * 6 * 2 * 2048 * 14336


def test_a_reading_of_unstated_metric_may_be_of_live_tensors_alone() -> None:
    setup = Setup(shape=LLAMA_7B, mode="infer", precision="bf16_pure")
    unstated, shown, live = (gpu_memory(replace(setup, metric=metric)) for metric in ("unknown", "nvml", "allocated"))
    assert unstated.binding.bytes == shown.binding.bytes
    assert (unstated.low, unstated.high) == (live.low, shown.high)


class TestTheSeedsTables:
    """CPM-9G's environment manual: recommended resources, and its table of extreme minima."""

    @pytest.mark.parametrize(
        ("setup", "what"),
        [
            (replace(BMTRAIN, shape=CPM_9G_100B, dp=64, nodes=8), "full tuning of 100B on 64 × 80 GB"),
            (replace(BMTRAIN, dp=16, nodes=2), "full tuning of 10B on 16 × 80 GB"),
            (
                replace(BMTRAIN, dp=2, mode="lora", lora_rank=64, lora_targets=CPM_9G_TARGETS),
                "LoRA of 10B on 2 × 80 GB",
            ),
            (replace(BMTRAIN, shape=CPM_9G_100B, tp=8, mode="infer"), "inference of 100B on 8 × 80 GB"),
            (replace(BMTRAIN, tp=2, mode="infer"), "inference of 10B on 2 × 80 GB"),
            (
                replace(BMTRAIN, shape=CPM_9G_100B, dp=8, mode="lora", lora_rank=64, lora_targets=CPM_9G_TARGETS),
                "LoRA of 100B on 8 × 80 GB",
            ),
        ],
    )
    def test_what_it_recommends_fits(self, setup: Setup, what: str) -> None:
        assert gpu_need(setup).verdict(A100_80) == "fits", what

    def test_training_100b_on_eight_cards_does_not_and_the_states_are_why(self) -> None:
        """Its own footnote: out of memory on the way."""
        memory = gpu_need(replace(BMTRAIN, shape=CPM_9G_100B, dp=8))
        assert memory.verdict(A100_80) == "does not fit"
        states = sum(part.bytes for part in memory.binding.lasting)
        assert states > A100_80 * MIB
        assert max(memory.binding.components, key=lambda part: part.bytes).name == "master copy and moments"

    def test_the_least_for_10b_is_49_gb_on_one_card(self) -> None:
        memory = gpu_memory(replace(BMTRAIN, offload_optimizer=True))
        assert memory.observed.bytes / GB == pytest.approx(49, rel=0.10)

    def test_inference_of_10b_takes_20_gb(self) -> None:
        memory = gpu_memory(replace(BMTRAIN, mode="infer"))
        assert memory.binding.bytes / GB == pytest.approx(20, rel=0.10)
