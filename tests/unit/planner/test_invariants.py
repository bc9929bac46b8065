"""What must hold for any setup: more work needs no less, more sharing no more, and every term says where it is from."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cpm_cluster.planner.accelerators import LINKS
from cpm_cluster.planner.cost import cost
from cpm_cluster.planner.fit import Component
from cpm_cluster.planner.gpu_memory import gpu_memory, gpu_need
from cpm_cluster.planner.host_memory import GATHERED, host_memory
from cpm_cluster.planner.setup import Engine, Setup, Shape
from cpm_cluster.planner.step_time import step_time

LLAMA_2_7B = Shape(hidden=4096, layers=32, heads=32, kv_heads=32, ffn=11008, vocab=32000)
LLAMA_3_8B = Shape(hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab=128256)
LLAMA_2_70B = Shape(hidden=8192, layers=80, heads=64, kv_heads=8, ffn=28672, vocab=32000)
GEMMA_2B = Shape(
    hidden=2048, layers=18, heads=8, kv_heads=1, ffn=16384, vocab=256000, tied_embeddings=True, head_dim=256
)


def gpt(hidden: int, layers: int, heads: int, vocab: int = 51200, **kind: str) -> Shape:
    """f = 4h, two matrices in the FFN, one for the vocabulary."""
    sizes = {"hidden": hidden, "layers": layers, "heads": heads, "kv_heads": heads, "ffn": 4 * hidden, "vocab": vocab}
    return Shape(**sizes, gated_mlp=False, tied_embeddings=True, **kind)


SHAPES = (
    *(LLAMA_2_7B, LLAMA_3_8B, LLAMA_2_70B, GEMMA_2B),
    *(gpt(768, 12, 12, 50257), gpt(12288, 96, 96), gpt(1024, 24, 16, 30522, kind="bert")),
    *(gpt(4096, 48, 64, 50048, kind="glm"), gpt(1024, 48, 16, 32128, kind="t5")),
)
VERSIONS: dict[Engine, tuple[str, ...]] = {
    "bmtrain": ("bmtrain 0.2.3", "1.0.1"),
    "deepspeed": ("", "deepspeed 0.9.5; transformers 4.31", "0.14.0", "0.17.1"),
    "fsdp": ("", "torch 2.2", "transformers 4.40", "torchtitan 2025-06; torch 2.6"),
    "ddp": ("", "torch 2.1"),
    "megatron": ("", "Megatron-DeepSpeed"),
    "none": ("", "litgpt", "ms-swift", "transformers 4.49; peft"),
}
STAGES: dict[Engine, tuple[int, ...]] = {
    "bmtrain": (2, 3),
    "deepspeed": (0, 1, 2, 3),
    "fsdp": (2, 3),
    "megatron": (0, 1),
}
ENGINES: tuple[Engine, ...] = tuple(VERSIONS)
SHARDED: tuple[Engine, ...] = ("bmtrain", "deepspeed", "fsdp")
GIB = 1 << 30
ANY = settings(max_examples=60, deadline=None, derandomize=True)
A_HUNDREDTH = 1.01  # stages and layers are whole numbers


@st.composite
def setups(
    draw: st.DrawFn, engines: tuple[Engine, ...] = ENGINES, modes: str = "full lora qlora reward infer"
) -> Setup:
    engine, mode = draw(st.sampled_from(engines)), draw(st.sampled_from(modes.split()))
    shape = draw(st.sampled_from(SHAPES))
    tp = draw(st.sampled_from((1, 2, 8))) if engine in ("megatron", "fsdp") or mode == "infer" else 1
    pp = draw(st.sampled_from((1, 4))) if engine == "megatron" else 1
    dp = 1 if engine == "none" else draw(st.sampled_from((1, 2, 8, 64)))
    precision = st.sampled_from(("nf4", "int8") if mode == "qlora" else ("fp32", "fp16", "bf16", "bf16_pure"))
    adapters = mode in ("lora", "qlora")
    stage = draw(st.sampled_from(STAGES.get(engine, (0,))))
    return Setup(
        shape=shape,
        mode=mode,
        lora_rank=draw(st.sampled_from((4, 64))) if adapters else 0,
        lora_targets=("q", "v") if adapters else (),
        trained_parameters_stated=shape.parameters // 4 if mode == "reward" else 0,
        engine=engine,
        engine_version=draw(st.sampled_from(VERSIONS[engine])),
        zero_stage=stage,
        pin_memory=draw(st.booleans()),
        zero_init=draw(st.booleans()),
        overlap_comm=draw(st.booleans()),
        bucket_elements=draw(st.sampled_from((0, 10**6))),
        max_live_params=draw(st.sampled_from((0, 10**7))),
        precision=draw(precision),
        micro_batch=draw(st.sampled_from((1, 4, 32))),
        grad_accum=draw(st.sampled_from((1, 16))),
        grad_accum_stated=draw(st.booleans()),
        seq_len=draw(st.sampled_from((512, 4096, 131072))),
        recompute=draw(st.sampled_from(("none", "full"))),
        flash_attention=draw(st.booleans()),
        sequence_parallel=tp > 1 and draw(st.booleans()),
        tp=tp,
        pp=pp,
        dp=dp,
        nodes=max(1, tp * pp * dp // 8),
        gpu=draw(st.sampled_from(("a100-80g", "h100-80g", "v100-32g"))),
    )


def on_a_gpu(setup: Setup) -> int:
    """Bytes that a card must have, without NCCL's: more ranks are more communicators, and larger ones across nodes."""
    instant = gpu_need(setup).binding
    return instant.bytes - sum(component.bytes for component in instant.components if component.name == "NCCL")


def per_token(setup: Setup) -> float:
    """GPU seconds of a token."""
    return 1 / step_time(setup).tokens_per_second_per_gpu


def shaped(setup: Setup, **sizes: int) -> Setup:
    shape = replace(setup.shape, **sizes)
    return replace(setup, shape=shape, trained_parameters_stated=_share(setup, shape))


def _share(setup: Setup, shape: Shape) -> int:
    """As large a part of the new shape is trained."""
    return round(setup.trained_parameters_stated / setup.shape.parameters * shape.parameters)


class TestMoreWorkNeedsNoLess:
    @ANY
    @given(setups(), st.sampled_from(("micro_batch", "seq_len", "lora_rank")))
    def test_of_tokens_and_rank(self, setup: Setup, what: str) -> None:
        more = replace(setup, **{what: 2 * getattr(setup, what)})
        assert on_a_gpu(more) >= on_a_gpu(setup)
        assert gpu_need(more).high >= gpu_need(setup).high
        assert host_memory(more).binding.bytes >= host_memory(setup).binding.bytes
        assert step_time(more).seconds >= (1 - 1e-9) * step_time(setup).seconds

    @ANY
    @given(setups(modes="full lora qlora infer"), st.sampled_from(("layers", "vocab", "ffn", "kv_heads")))
    def test_of_a_larger_model(self, setup: Setup, what: str) -> None:
        assume(what != "kv_heads" or setup.shape.kv_heads < setup.shape.heads)
        more = shaped(setup, **{what: 2 * getattr(setup.shape, what)})
        assert A_HUNDREDTH * on_a_gpu(more) >= on_a_gpu(setup)
        assert host_memory(more).binding.bytes >= host_memory(setup).binding.bytes

    @ANY
    @given(setups())
    def test_of_a_wider_model(self, setup: Setup) -> None:
        shape = setup.shape
        wider = shaped(setup, hidden=2 * shape.hidden, heads=2 * shape.heads, kv_heads=2 * shape.kv_heads)
        assert on_a_gpu(wider) >= on_a_gpu(setup)

    @ANY
    @given(setups())
    def test_scores_that_are_stored_need_memory_and_time(self, setup: Setup) -> None:
        fused, stored = (replace(setup, flash_attention=how) for how in (True, False))
        assert on_a_gpu(stored) >= on_a_gpu(fused)
        assert step_time(stored).seconds >= (1 - 1e-9) * step_time(fused).seconds

    @ANY
    @given(setups(modes="full"))
    def test_half_precision_throughout_needs_no_more_than_mixed(self, setup: Setup) -> None:
        mixed, pure = (replace(setup, precision=precision) for precision in ("bf16", "bf16_pure"))
        assert on_a_gpu(pure) <= on_a_gpu(mixed)

    @ANY
    @given(setups(modes="lora"))
    def test_adapters_of_two_matrices_need_no_more_than_full_tuning(self, setup: Setup) -> None:
        """Of all seven they may: each keeps its input with dropout, and the mask, whole on tensor-parallel ranks."""
        setup = replace(setup, tp=1, sequence_parallel=False)
        full = replace(setup, mode="full", lora_rank=0, lora_targets=())
        assert on_a_gpu(setup) <= on_a_gpu(full)

    @ANY
    @given(setups(modes="lora", engines=("deepspeed", "fsdp", "ddp", "none")), st.sampled_from(("nf4", "int8")))
    def test_quantised_weights_need_less_than_half_ones(self, setup: Setup, precision: str) -> None:
        """Activations may need more: peft makes what is not quantised fp32, and the stream of activations with it."""
        names = ("frozen weights", "nf4 weights", "int8 weights", "embeddings and norms")

        def frozen(one: Setup) -> int:
            return sum(component.bytes for component in gpu_need(one).instants[-1].lasting if component.name in names)

        assume(setup.shape.parameters > 10**9 and setup.shape.vocab < 100_000)
        quantised = replace(setup, mode="qlora", precision=precision)
        assert frozen(quantised) < frozen(replace(setup, precision="bf16"))


class TestSharingNeedsNoMore:
    @ANY
    @given(setups(engines=SHARDED), st.sampled_from((2, 8)))
    def test_among_more_data_parallel_ranks(self, setup: Setup, times: int) -> None:
        """From two on: on one rank nothing is gathered."""
        assume(setup.dp > 1)
        more = replace(setup, dp=times * setup.dp, nodes=times * setup.nodes)
        assert on_a_gpu(more) <= on_a_gpu(setup)

    @ANY
    @given(setups(engines=("megatron", "fsdp", "none")), st.sampled_from((2, 4, 8)))
    def test_among_more_tensor_parallel_ranks(self, setup: Setup, times: int) -> None:
        one = replace(setup, tp=1, sequence_parallel=False, nodes=1)
        more = replace(one, tp=times)
        assert on_a_gpu(more) <= A_HUNDREDTH * on_a_gpu(one)
        assert on_a_gpu(replace(more, sequence_parallel=True)) <= on_a_gpu(more)

    @ANY
    @given(setups(engines=("fsdp", "none", "megatron"), modes="full lora"))
    def test_tensor_parallel_ranks_divide_weights_and_activations_of_any_engine(self, setup: Setup) -> None:
        setup = replace(setup, dp=1, pp=1, nodes=1, recompute="none", flash_attention=False, sequence_parallel=False)
        assume(setup.shape.kv_heads >= 8 and setup.shape.parameters > 5 * 10**9)
        one, eight = (on_a_gpu(replace(setup, tp=ranks)) for ranks in (1, 8))
        assert eight < 0.5 * one

    @ANY
    @given(setups(engines=("deepspeed",), modes="full"))
    def test_in_a_higher_zero_stage(self, setup: Setup) -> None:
        """But for buffers, which a small model does not make up for (DeepSpeed#5305), and a matrix on its way."""
        assume(setup.dp >= 8 and setup.shape.parameters > 5 * 10**9)
        setup = replace(setup, bucket_elements=10**6, zero_init=True)
        held = [on_a_gpu(replace(setup, zero_stage=stage)) for stage in (0, 1, 2, 3)]
        assert all(more <= A_HUNDREDTH * less for less, more in pairwise(held))

    @ANY
    @given(setups(engines=("fsdp",), modes="full lora reward"))
    def test_of_fsdp_where_weights_are_given_back_after_use(self, setup: Setup) -> None:
        """torch/distributed/fsdp/api.py: SHARD_GRAD_OP keeps them to the backward pass, FULL_SHARD does not."""
        assume(setup.dp > 1 and setup.zero_init)
        kept, given_back = (replace(setup, zero_stage=stage) for stage in (2, 3))
        assert on_a_gpu(given_back) <= on_a_gpu(kept)

    @ANY
    @given(setups(engines=SHARDED, modes="infer"))
    def test_of_weights_that_are_only_read(self, setup: Setup) -> None:
        setup = replace(setup, shape=LLAMA_2_70B, zero_stage=3, dp=8, tp=1, nodes=1, seq_len=512, micro_batch=1)
        assert on_a_gpu(setup) < 0.35 * on_a_gpu(replace(setup, zero_stage=0))


class TestTradesOfMemoryForTime:
    @ANY
    @given(setups(modes="full lora qlora reward"))
    def test_recomputation_needs_less_memory_and_more_time(self, setup: Setup) -> None:
        kept, again = (replace(setup, recompute=kind) for kind in ("none", "full"))
        assume(setup.pp == 1 and setup.mode != "reward")  # of few blocks, the inputs may be more than one block's own
        assert on_a_gpu(again) <= on_a_gpu(kept)
        assert step_time(again).seconds >= step_time(kept).seconds

    @ANY
    @given(setups(engines=("bmtrain", "deepspeed"), modes="full lora"))
    def test_an_optimizer_on_the_host_needs_less_gpu_more_host_and_more_time(self, setup: Setup) -> None:
        """Of many small shares the largest matrix's gradient may outweigh one: it is made fp32 on its way."""
        setup = replace(setup, zero_stage=max(setup.zero_stage, 1))
        moved = replace(setup, offload_optimizer=True)
        assert on_a_gpu(moved) <= on_a_gpu(setup) or (setup.dp == 64 or setup.shape.parameters < 5 * 10**9)
        assert training(moved) > training(setup)
        assert step_time(moved).seconds > step_time(setup).seconds

    @ANY
    @given(setups(engines=("deepspeed", "fsdp"), modes="full lora reward infer"))
    def test_so_do_weights_on_the_host(self, setup: Setup) -> None:
        setup = replace(setup, zero_stage=3)
        moved = replace(setup, offload_optimizer=True, offload_param=True)
        assert on_a_gpu(moved) <= on_a_gpu(setup)
        assert training(moved) - training(setup) >= 1.9 * setup.shape.parameters / setup.shards / setup.tp

    @ANY
    @given(setups(engines=("deepspeed",), modes="full"))
    def test_nothing_is_offloaded_without_zero(self, setup: Setup) -> None:
        setup = replace(setup, zero_stage=0)
        moved = replace(setup, offload_optimizer=True)
        assert (on_a_gpu(moved), training(moved)) == (on_a_gpu(setup), training(setup))

    @ANY
    @given(setups(engines=("bmtrain", "deepspeed", "fsdp"), modes="full"))
    def test_more_ranks_on_a_node_need_more_host_memory(self, setup: Setup) -> None:
        few, many = (replace(setup, dp=ranks, tp=1, nodes=1) for ranks in (2, 8))
        assert training(many) > training(few)

    @ANY
    @given(setups(engines=("bmtrain", "deepspeed", "fsdp", "ddp")))
    def test_more_nodes_are_no_faster_for_each_gpu(self, setup: Setup) -> None:
        few, many = (replace(setup, dp=8 * nodes, tp=1, nodes=nodes) for nodes in (1, 4))
        assert per_token(many) >= 0.999 * per_token(few)

    @ANY
    @given(setups(engines=SHARDED, modes="full reward"))
    def test_accumulation_is_no_slower_for_each_token(self, setup: Setup) -> None:
        """Stage 2 reduces gradients in every micro step, behind that one's computation."""
        one, more = (replace(setup, grad_accum=count, grad_accum_stated=True) for count in (2, 16))
        assert per_token(more) <= 1.001 * per_token(one)


class TestServing:
    SERVED = Setup(shape=LLAMA_2_70B, mode="infer", precision="bf16", micro_batch=16, seq_len=4096, tp=8)

    def cache(self, **changes: object) -> int:
        setup = replace(self.SERVED, **changes)
        return next(c.bytes for c in gpu_memory(setup).binding.components if c.name == "key/value cache")

    def test_a_rank_has_at_least_one_head_of_the_keys(self) -> None:
        """16 ranks of 8 heads: as much each as with 8."""
        assert self.cache(tp=8) == self.cache(tp=4) / 2 == self.cache(tp=16)

    def test_keys_have_the_type_of_the_weights(self) -> None:
        assert self.cache(precision="fp32") == 2 * self.cache()

    def test_of_uneven_stages_the_largest_counts(self) -> None:
        stages = replace(self.SERVED, tp=1, pp=3)
        found = next(c.bytes for c in gpu_memory(stages).binding.components if c.name == "key/value cache")
        assert found == 4 * 27 * 1024 * 16 * 4096

    def test_an_encoder_keeps_none(self) -> None:
        encoder = gpu_memory(Setup(shape=gpt(1024, 24, 16, kind="bert"), mode="infer", precision="fp16"))
        assert all(component.name != "key/value cache" for component in encoder.binding.components)


class TestPipelines:
    GPT_3 = Setup(shape=gpt(12288, 96, 96), engine="megatron", precision="fp16", tp=8, pp=8, nodes=8, seq_len=2048)

    def test_accumulation_that_is_not_stated_fills_the_pipeline(self) -> None:
        stated, unstated = (replace(self.GPT_3, grad_accum=8), replace(self.GPT_3, grad_accum_stated=False))
        assert on_a_gpu(unstated) == on_a_gpu(stated) > on_a_gpu(self.GPT_3)

    def test_the_first_stage_is_the_fullest_and_interleaving_makes_it_fuller(self) -> None:
        setup = replace(self.GPT_3, grad_accum=64)
        assert "first stage" in gpu_need(setup).binding.name
        assert on_a_gpu(replace(setup, virtual_stages=3)) > on_a_gpu(setup)

    def test_a_stage_that_is_not_even_has_the_larger_part(self) -> None:
        uneven = shaped(self.GPT_3, layers=89)
        assert on_a_gpu(uneven) == pytest.approx(on_a_gpu(self.GPT_3), rel=0.001)

    def test_selective_recomputation_makes_the_scores_of_one_block_again(self) -> None:
        setup = replace(self.GPT_3, recompute="selective", flash_attention=False)
        again = {c.name: c.bytes for instant in gpu_need(setup).instants for c in instant.components}
        assert again["scores of one block"] == 5 * 96 * 2048**2 / 8


@pytest.mark.parametrize(
    ("setup", "bytes_by_hand"),
    [
        pytest.param(  # 4 + 4 + 8, buckets 4, square roots of foreach AdamW 4
            Setup(shape=LLAMA_2_7B, engine="ddp", dp=8, recompute="full", engine_version="torch 2.1"),
            24 * LLAMA_2_7B.parameters,
            id="7B AdamW under autocast, DDP",
        ),
        pytest.param(  # 5 a s² b a layer of a half-precision softmax, its mask and result; 44 s b h of the rest
            Setup(shape=LLAMA_2_7B, engine="ddp", dp=8, micro_batch=4, flash_attention=False),
            18 * LLAMA_2_7B.parameters + 4 * 32 * (5 * 32 * 2048**2 + 46 * 2048 * 4096),
            id="the same with scores",
        ),
        pytest.param(  # 12 of 16 bytes over the ranks before the backward pass, 10^9 gathered, the largest matrix
            Setup(shape=LLAMA_2_70B, engine="deepspeed", zero_stage=3, dp=64, nodes=8, recompute="full", seq_len=4096),
            14 * LLAMA_2_70B.parameters // 64 + 2 * 10**9 + 6 * 8192 * 28672 + 2 * 4096 * 8192 * 80 + 18 * 4096 * 32000,
            id="70B ZeRO-3 on 64",
        ),
        pytest.param(
            Setup(
                shape=LLAMA_2_70B,
                engine="fsdp",
                engine_version="torch 2.6",
                zero_stage=3,
                dp=64,
                nodes=8,
                recompute="full",
                seq_len=4096,
            ),
            12 * LLAMA_2_70B.parameters // 64
            + 6 * LLAMA_2_70B.parameters_per_layer
            + 4 * 32000 * 8192
            + 2 * 4096 * 8192 * 80
            + 16 * 4096 * 32000,
            id="70B FSDP on 64",
        ),
        pytest.param(  # 18 N/(t p) and the embedding; 34 s b h / t for 12 layers and 8 micro batches
            replace(
                TestPipelines.GPT_3, grad_accum=64, recompute="selective", sequence_parallel=True, flash_attention=False
            ),
            18 * (12 * 12 * 12288**2 + 51200 * 12288) // 8 + 34 * 2048 * 12288 // 8 * 12 * 8,
            id="175B, tensors over 8, pipeline of 8 (Korthikanti et al. 2022)",
        ),
        pytest.param(
            Setup(
                shape=gpt(6144, 48, 64),
                engine="megatron",
                precision="fp16",
                tp=8,
                micro_batch=4,
                recompute="selective",
                sequence_parallel=True,
                flash_attention=False,
            ),
            18 * gpt(6144, 48, 64).parameters // 8 + 34 * 4 * 2048 * 6144 // 8 * 48,
            id="22B, tensors over 8 (Korthikanti et al. 2022)",
        ),
        pytest.param(
            Setup(
                shape=LLAMA_2_70B,
                mode="lora",
                lora_rank=16,
                lora_targets=("q", "v"),
                engine="fsdp",
                engine_version="torch 2.6",
                zero_stage=3,
                dp=8,
                recompute="full",
            ),
            2 * LLAMA_2_70B.parameters // 8
            + 4 * LLAMA_2_70B.parameters_per_layer
            + 4 * 32000 * 8192
            + 2 * 2048 * 8192 * 80
            + 16 * 2048 * 32000,
            id="70B LoRA on 8",
        ),
        pytest.param(  # 4.127 bits of a weight, embeddings in fp32; adapters in fp32 with gradients and 8-bit moments
            Setup(
                shape=Shape(hidden=8192, layers=80, heads=64, kv_heads=64, ffn=22016, vocab=32000),
                mode="qlora",
                lora_rank=64,
                lora_targets=("q", "k", "v", "o", "gate", "up", "down"),
                engine_version="transformers 4.30; peft",
                precision="nf4_dq",
                optimizer="paged_adamw_8bit",
                seq_len=512,
                recompute="full",
            ),
            round(
                0.5159 * 80 * (4 * 8192**2 + 3 * 8192 * 22016)
                + 2 * 4 * 32000 * 8192
                + (4 + 4 + 2) * 64 * 80 * (4 * 2 * 8192 + 3 * (8192 + 22016))
                + 46 * 512 * 8192 * 2
            ),
            id="65B QLoRA on one card of 48 GB (Dettmers et al. 2023)",
        ),
        pytest.param(
            TestServing.SERVED,
            2 * LLAMA_2_70B.parameters // 8 + 2 * 2 * 80 * 128 * 16 * 4096,
            id="70B served by 8",
        ),
        pytest.param(
            replace(TestServing.SERVED, tp=1, micro_batch=1, precision="int4_gptq"),
            round(0.5195 * 80 * LLAMA_2_70B.linear_parameters_per_layer) + 4 * 32000 * 8192 + 4 * 80 * 1024 * 4096,
            id="70B served in 4 bits",
        ),
        pytest.param(
            Setup(
                shape=Shape(hidden=5120, layers=40, heads=40, kv_heads=40, ffn=13824, vocab=32000),
                engine="deepspeed",
                engine_version="0.14.0",
                zero_stage=2,
                offload_optimizer=True,
                dp=8,
                recompute="full",
            ),
            2 * 13_015_864_320 + 2 * 500_000_000 + 6 * 32000 * 5120 + 2 * 2048 * 5120 * 40,
            id="13B ZeRO-2 with the optimizer on the host",
        ),
        pytest.param(
            Setup(shape=LLAMA_3_8B, precision="bf16_pure", recompute="full"),
            (2 + 2 + 4 + 2) * LLAMA_3_8B.parameters,
            id="8B in bf16 throughout",
        ),
    ],
)
def test_well_known_setups_are_what_is_counted_by_hand(setup: Setup, bytes_by_hand: int) -> None:
    """Live tensors at their fullest, from the papers' formulas and the engines' code."""
    assert gpu_memory(replace(setup, metric="allocated")).binding.bytes == pytest.approx(bytes_by_hand, rel=0.1)


class TestAnswers:
    @ANY
    @given(setups())
    def test_the_value_is_within_its_interval_and_says_where_every_term_is_from(self, setup: Setup) -> None:
        memory, host, time = gpu_need(setup), host_memory(setup), step_time(setup)
        assert memory.low <= memory.binding.bytes <= memory.high
        assert host.binding.bytes <= host.high
        assert 0 < time.low <= time.seconds <= time.high
        components = [c for instant in (*memory.instants, *host.instants) for c in instant.components]
        assert all(component.bytes >= 0 and told(component) for component in components)
        assert all(term.seconds > 0 and term.formula and term.source for term in time.terms)

    @ANY
    @given(setups())
    def test_speed_and_flops_agree_and_no_card_exceeds_its_peak(self, setup: Setup) -> None:
        time = step_time(setup)
        assert time.mfu is not None
        assert time.mfu * time.peak_flops == pytest.approx(time.tokens_per_second_per_gpu * time.model_flops_per_token)
        unmasked = time.model_flops_per_token - time.masked_flops_per_token
        assert 0 < time.tokens_per_second_per_gpu * unmasked < 0.91 * time.peak_flops

    @ANY
    @given(setups(), st.integers(1, 1000))
    def test_cost_is_in_proportion_to_steps_price_and_power(self, setup: Setup, steps: int) -> None:
        time = step_time(setup)
        one, many = (cost(setup, time, count, cluster_price_usd=2.0) for count in (1, steps))
        assert many.gpu_hours.value == pytest.approx(steps * one.gpu_hours.value)
        assert many.gpu_hours.value == pytest.approx(many.seconds.value / 3600 * setup.gpus)
        assert many.price_usd is not None
        assert many.price_usd.value == pytest.approx(2 * many.gpu_hours.value)
        watts = LINKS[setup.gpu].board_power_w
        assert many.energy_kwh.value == pytest.approx(many.gpu_hours.value * 1.59 * watts / 1000)
        assert many.seconds.low <= many.seconds.value <= many.seconds.high

    @ANY
    @given(setups())
    def test_of_a_card_that_nobody_knows_the_time_is_less_sure(self, setup: Setup) -> None:
        known, unknown = (step_time(replace(setup, gpu=gpu)) for gpu in ("a100-40g", "unheard of"))
        assert unknown.spread > known.spread


def test_an_encoder_computes_both_halves_of_its_attention() -> None:
    """Fused kernels leave out what a causal mask hides."""
    decoder = Setup(shape=gpt(1024, 24, 16), precision="bf16", seq_len=16384, gpu="a100-80g")
    encoder = replace(decoder, shape=gpt(1024, 24, 16, kind="bert"))
    of_both = [next(t.seconds for t in step_time(one).terms if t.name == "attention") for one in (decoder, encoder)]
    assert of_both[1] == pytest.approx(2 * of_both[0])
    assert step_time(encoder).masked_flops_per_token == 0


def test_no_card_before_ampere_runs_flash_attention_2() -> None:
    def attention(gpu: str, precision: str = "fp16") -> float:
        setup = Setup(shape=LLAMA_2_7B, precision=precision, gpu=gpu)
        time = step_time(setup)
        return next(t.seconds for t in time.terms if t.name == "attention") * time.peak_flops

    assert attention("v100-32g") > 1.5 * attention("a100-80g")
    assert attention("a100-80g", "fp32") > 1.5 * attention("a100-80g")


def test_a_model_of_which_a_row_states_more_parameters_than_its_shape_has_them_quantised() -> None:
    """Experts of a mixture: 46.7e9 parameters in the layers of a model of 7e9."""
    mixture = replace(LLAMA_3_8B, vocab=32000, parameters_stated=46_700_000_000)
    assert 24 * GIB < on_a_gpu(Setup(shape=mixture, mode="infer", precision="nf4")) < 28 * GIB


@pytest.mark.parametrize(("version", "buckets"), [("0.12.6", 0), ("0.12.7", 1), ("0.17.1", 1), ("", 1)])
def test_stage_1_of_deepspeed_has_a_bucket_since_it_reduces_as_stage_2_does(version: str, buckets: int) -> None:
    """deepspeed/runtime/engine.py: contiguous_gradients was left to stage 2 before."""
    setup = Setup(shape=LLAMA_2_7B, engine="deepspeed", engine_version=version, zero_stage=1, dp=8)
    found = [c.bytes for c in gpu_need(setup).instants[0].components if c.name == "reduce bucket"]
    assert found == buckets * [2 * 500_000_000]


def test_autocast_keeps_half_copies_of_what_is_trained_alone() -> None:
    """aten/src/ATen/autocast_mode.cpp caches casts of leaves that require a gradient."""
    reward = Setup(shape=LLAMA_2_7B, mode="reward", trained_parameters_stated=10**9, precision="fp16")
    found = {c.name: c.bytes for c in gpu_need(reward).instants[0].components}
    assert found["half copies of the weights"] == 2 * 10**9


def told(component: Component) -> bool:
    return bool(component.name and component.formula and component.source)


def training(setup: Setup) -> int:
    """Bytes of the host in training, without what rank 0 gathers to save."""
    instants = {instant.name: instant for instant in host_memory(setup).instants}
    return sum(component.bytes for component in instants["training"].components if component.name != GATHERED)
