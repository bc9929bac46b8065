"""From a job to what the models of memory and time read: field by field, by engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from planned_jobs import SMALL, N, packaged, small

from cpm_cluster.planner.job_setup import as_loaded, job_setup
from cpm_cluster.planner.setup import Setup
from cpm_cluster.specs.job import JobSpec

GPT = "model={layers: 10, hidden: 2048, heads: 16, ffn: 8192, vocab: 4096, gated_mlp: false, block: decoder}"


def setup_of(spec: JobSpec) -> Setup:
    setup = job_setup(spec)
    assert setup is not None
    return setup


class TestShape:
    def test_the_parameters_are_those_of_the_dimensions(self, tmp_path: Path) -> None:
        assert setup_of(small(tmp_path)).shape.parameters == N

    def test_a_changed_part_of_a_packaged_model_counts_whatever_its_file_states(self) -> None:
        whole = setup_of(packaged("lora_10b")).shape.parameters
        assert whole == pytest.approx(8.77e9, rel=1e-3)
        assert setup_of(packaged("lora_10b", "model.layers=64")).shape.parameters > 1.7 * whole

    def test_grouped_heads_and_tied_embeddings_are_kept(self) -> None:
        shape = setup_of(packaged("quickstart")).shape
        assert (shape.kv_heads, shape.tied_embeddings, shape.parameters) == (2, True, 1_000_576)


class TestMethod:
    def test_full_tuning_trains_all(self, tmp_path: Path) -> None:
        setup = setup_of(small(tmp_path))
        assert (setup.mode, setup.trained_parameters) == ("full", N)

    def test_lora_trains_r_times_in_plus_out_of_each_adapted_layer(self, tmp_path: Path) -> None:
        setup = setup_of(small(tmp_path, "method={lora: {rank: 4, targets: [project_q, w_out]}}"))
        assert setup.mode == "lora"
        assert setup.trained_parameters == 10 * 4 * ((2048 + 2048) + (8192 + 2048))

    def test_both_branches_of_a_gated_ffn_can_be_adapted(self, tmp_path: Path) -> None:
        setup = setup_of(small(tmp_path, "method={lora: {rank: 4, targets: [w_0, w_1]}}"))
        assert setup.trained_parameters == 10 * 4 * 2 * (2048 + 8192)

    def test_without_a_gate_there_is_only_one(self, tmp_path: Path) -> None:
        overrides = ("engine=deepspeed", GPT, "method={lora: {rank: 4, targets: [w_0, w_1]}}")
        assert setup_of(small(tmp_path, *overrides)).trained_parameters == 10 * 4 * (2048 + 8192)


class TestEngine:
    @pytest.mark.parametrize(
        ("overrides", "engine", "stage"),
        [
            (("engine=torch", "training.zero_stage=0"), "ddp", 0),
            (("engine=torch", "training.zero_stage=2"), "fsdp", 3),  # fully_shard gives weights back after use
            (("engine=torch",), "fsdp", 3),
            (("engine=bmtrain", "training.zero_stage=2"), "bmtrain", 2),
            (("engine=deepspeed", "training.zero_stage=1"), "deepspeed", 1),
        ],
    )
    def test_is_ours_or_the_one_that_the_job_names(
        self, overrides: tuple[str, ...], engine: str, stage: int, tmp_path: Path
    ) -> None:
        setup = setup_of(small(tmp_path, *overrides))
        assert (setup.engine, setup.zero_stage) == (engine, stage)

    def test_its_version_is_that_of_the_image(self) -> None:
        assert setup_of(packaged("full_10b")).engine_version == "0.2.3.post2 torch 1.13.1"

    def test_bmtrain_before_1_always_recomputes(self) -> None:
        assert setup_of(packaged("full_10b", "training.recompute=none")).recompute == "full"
        newer = ("image=9g-0.0.13", "training.recompute=none")
        assert setup_of(packaged("full_10b", *newer)).recompute == "none"

    def test_ddp_reads_the_whole_model_on_every_rank_and_fsdp_does_not(self, tmp_path: Path) -> None:
        loaded = as_loaded(setup_of(small(tmp_path, "engine=torch", "training.zero_stage=0")))
        assert (loaded.precision, loaded.zero_init) == ("fp32", False)
        sharded = setup_of(small(tmp_path, "engine=torch", "training.zero_stage=3"))
        assert as_loaded(sharded) == sharded
        bmtrain = setup_of(small(tmp_path, "engine=bmtrain"))
        assert as_loaded(bmtrain) == bmtrain


class TestRun:
    def test_ranks_nodes_and_batch(self) -> None:
        setup = setup_of(packaged("full_100b"))
        assert (setup.dp, setup.nodes, setup.gpus_per_node) == (64, 8, 8)
        assert (setup.micro_batch, setup.grad_accum, setup.seq_len) == (1, 4, 4096)
        assert (setup.gpu, setup.gpu_memory_mib) == ("a100-80g", 81251)
        assert setup.host_memory_gb == pytest.approx(512 * 2**30 / 1e9)

    @pytest.mark.parametrize(
        ("overrides", "fused"),
        [
            ((), True),  # flash-attn is in the image
            (("training.attention=math",), False),
            (("training.attention=sdpa",), False),  # torch 1.13 has none
            (("training.attention=auto", "image.flash_attn=null"), False),
            (("training.attention=auto", "image.flash_attn=null", "image.torch=2.1.0"), True),
        ],
    )
    def test_scores_are_stored_where_no_fused_kernel_is_there(self, overrides: tuple[str, ...], fused: bool) -> None:
        assert setup_of(packaged("full_10b", *overrides)).flash_attention == fused

    def test_an_image_is_no_help_on_a_card_that_its_kernel_does_not_know(self) -> None:
        volta = ("cluster=slurm", "resources.gpu=v100-32g", "training.attention=auto")
        assert not setup_of(packaged("full_10b", *volta)).flash_attention

    def test_without_gpus_none_is_named(self) -> None:
        setup = setup_of(packaged("quickstart"))
        assert (setup.gpu, setup.gpu_memory_mib, setup.dp) == ("cpu", 0, 2)

    def test_of_a_program_of_the_users_own_nothing_is_known(self, tmp_path: Path) -> None:
        assert job_setup(replace(packaged("sft_cpm9g_command"), workload=None)) is None
        bare = SMALL.replace("data:", "engine: command\ncommand: [x]\nenv: {A: b}\n#").replace("model:", "#")
        assert job_setup(small(tmp_path, job=bare)) is None


@pytest.mark.parametrize(
    ("overrides", "masks"),
    [
        ((), False),  # flash-attn is in the image
        (("image.flash_attn=null",), True),
        (("image.flash_attn=null", "image.torch=2.10.0"), False),
        (("training.attention=sdpa",), True),
        (("training.precision=fp32",), True),
    ],
)
def test_rows_need_masks_where_no_kernel_is_told_where_documents_begin(overrides: tuple[str, ...], masks: bool) -> None:
    auto = ("engine=torch", "training.attention=auto")
    assert setup_of(packaged("lora_10b", *auto, *overrides)).row_masks is masks
