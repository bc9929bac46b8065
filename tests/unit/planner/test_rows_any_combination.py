"""Rows of any legal combination of values: each is predicted, or named with its place; more work never needs less."""

from __future__ import annotations

import csv
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_cluster.planner.evaluate import Prediction, evaluate, predict
from cpm_cluster.planner.gpu_memory import gpu_need
from cpm_cluster.planner.model_states import model_states
from cpm_cluster.planner.row_checks import read_table
from cpm_cluster.planner.rows import Row, row_of
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.stages import stages
from cpm_cluster.planner.step_time import tokens_per_second_per_gpu

DATA = Path(__file__).parents[2] / "data"
COLUMNS = (DATA / "measured_runs.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
# Parameters per layer are whole numbers; a stage of a pipeline has the model's mean of what is quantised.
ROUNDING = 0.005

Cells = dict[str, str]


def one_of(*values: object) -> st.SearchStrategy[str]:
    """Any of the values; an empty cell is not stated."""
    return st.sampled_from(["", *map(str, values)])


FLAG = one_of(0, 1)
WITHOUT_SHAPE = {
    **dict.fromkeys(("gated_mlp", "tied_embeddings", "offload_optimizer", "offload_param", "pin_memory"), FLAG),
    **dict.fromkeys(("zero_init", "overlap_comm", "flash_attn", "gpu_censored"), FLAG),
    **dict.fromkeys(("use_gpu", "use_fit", "use_host", "use_time"), FLAG),
    "mode": st.sampled_from(["full", "lora", "qlora", "reward", "infer"]),
    "engine": st.sampled_from(["bmtrain", "deepspeed", "fsdp", "ddp", "megatron", "none"]),
    "engine_version": one_of(
        "litgpt; torch 2.0.1", "torchtitan 2025-06", "transformers 4.26.1", "Megatron-DeepSpeed", "trl"
    ),
    "precision": one_of(
        *("fp32", "fp16", "bf16", "fp16_pure", "bf16_pure", "bf16_fp32grad", "fp8"),
        *("nf4", "nf4_dq", "int4_gptq", "int8_gptq", "int4", "int8"),
    ),
    "optimizer": one_of("adamw", "adamw_8bit", "sgd", "adafactor", "lion", "paged_adamw_8bit"),
    "arch_kind": one_of("decoder", "glm", "t5", "bert"),
    "recompute": one_of("none", "selective", "full"),
    "memory_metric": one_of("nvml", "reserved", "allocated", "unknown"),
    "outcome": one_of("ok", "oom_gpu", "oom_host"),
    "zero_stage": one_of(0, 1, 2, 3),
    "lora_rank": one_of(0, 1, 8, 512),
    "lora_targets": one_of("q+v", "qkv", "q+k+v+o+gate+up+down+lm_head", "q+embed_full+head_full"),
    "trainable_params": one_of(1, 10**6, 10**9),
    "bucket_elems": one_of(1, 10**5, 5 * 10**8),
    "max_live_params": one_of(1, 10**9),
    "micro_batch": one_of(1, 3, 64),
    "grad_accum": one_of(1, 7, 2048),
    "seq_len": st.sampled_from(["1", "13", "512", "131072"]),
    "gpu": one_of("A100", "V100", "H100", "T4", "MI300X", "a card of the future"),
    "gpu_mem_gb": one_of(8, 16, 80, 192),
    "gpu_mem_mb": one_of(0, 30000),
    "host_mem_gb": one_of(0, 64.5),
    "tokens_per_s_per_gpu": one_of(0, 1234.5),
    "note": one_of(
        "mean 300 tokens", "HSDP", "embeddings count as layers", "interleaved pipeline, 0 chunks", "head size 0"
    ),
}


@st.composite
def rows(draw: st.DrawFn) -> Cells:
    """A legal row, whose parameters are counted from its shape."""
    cells = {**dict.fromkeys(COLUMNS, ""), **{column: draw(values) for column, values in WITHOUT_SHAPE.items()}}
    heads = draw(st.sampled_from([1, 7, 32, 64]))
    shape: dict[str, int] = {
        "hidden": heads * draw(st.sampled_from([64, 80, 128])),
        "layers": draw(st.sampled_from([1, 2, 24, 61])),
        "heads": heads,
        "kv_heads": draw(st.sampled_from([1, heads])),
        "ffn": draw(st.sampled_from([1, 11008])),
        "vocab": draw(st.sampled_from([2, 32000, 256000])),
    }
    stages_of = [degree for degree in (1, 2, 5, 12) if degree <= shape["layers"]]
    ways = [draw(st.sampled_from(degrees)) for degrees in ([1, 2, 3, 8], stages_of, [1, 2, 64, 1000])]
    gpus = math.prod(ways)
    topology = dict(zip(("tp", "pp", "dp"), ways, strict=True)) | {"n_gpus": gpus, "n_nodes": draw(one_of(1, gpus))}
    return cells | {name: str(value) for name, value in (shape | topology | {"id": "any", "source": "any"}).items()}


def written(*table: Cells) -> tuple[list[Row], list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(table)
        return read_table(path)


def assert_sound(prediction: Prediction) -> None:
    numbers = (prediction.gpu_mem_mb, prediction.host_mem_gb, prediction.tokens_per_s_per_gpu, prediction.low)
    assert all(number is not None and math.isfinite(number) and number > 0 for number in numbers), prediction
    assert prediction.low <= prediction.gpu_mem_mb <= prediction.high < math.inf


@settings(max_examples=150, deadline=None)
@given(rows(), st.sampled_from(COLUMNS))
def test_every_legal_row_is_predicted_and_so_is_one_that_states_less(cells: Cells, left_out: str) -> None:
    """Only what engine, mode and length are must be stated, or as many parameters as the shape has."""
    found, wrong = written(cells)
    assert wrong == []
    assert_sound(predict(found[0], tokens_per_second_per_gpu))
    less, wrong = written({**cells, "params_b": "7", left_out: ""})
    assert len(less) + len(wrong) == 1
    named = "n_gpus" if left_out in ("tp", "pp") else left_out  # ranks that no way of parallelism accounts for
    assert all(f"rows.csv:2: {named}: " in problem for problem in wrong)
    assert not wrong or left_out in ("engine", "mode", "seq_len", "tp", "pp")
    for row in less:
        assert_sound(predict(row, tokens_per_second_per_gpu))


@settings(max_examples=100, deadline=None)
@given(rows(), st.sampled_from(COLUMNS), st.sampled_from(["nan", "inf", "-1", "1e400", "many", "1,024", "2.5.1"]))
def test_nonsense_in_one_cell_is_named_and_loses_no_other_row(cells: Cells, column: str, nonsense: str) -> None:
    found, wrong = written({**cells, column: nonsense}, {**cells, "id": "other"})
    assert found[-1].id == "other"
    assert len(found) == 2 or any(f"rows.csv:2: {column}: " in problem for problem in wrong)
    for prediction in evaluate(found).predictions:
        assert_sound(prediction)


def grown(setup: Setup, column: str) -> Setup:
    if column == "layers":
        return replace(setup, shape=replace(setup.shape, layers=2 * setup.shape.layers))
    return replace(setup, **{column: 2 * getattr(setup, column)})


@settings(max_examples=150, deadline=None)
@given(rows(), st.sampled_from(["micro_batch", "seq_len", "layers"]))
def test_more_work_never_needs_less_memory(cells: Cells, column: str) -> None:
    row = row_of({**cells, "trainable_params": ""})
    more = replace(row, setup=grown(row.setup, column))
    (small, large), shrunk = (predict(row), predict(more)), 1 - ROUNDING
    assert large.gpu_mem_mb >= shrunk * small.gpu_mem_mb
    assert (large.low, large.high) >= (shrunk * small.low, shrunk * small.high)
    assert large.host_mem_gb >= shrunk * small.host_mem_gb
    assert gpu_need(more.setup).high >= shrunk * gpu_need(row.setup).high


@settings(max_examples=100, deadline=None)
@given(rows(), st.sampled_from(["deepspeed", "fsdp", "bmtrain"]))
def test_more_ranks_never_hold_more_of_a_model_that_is_sharded(cells: Cells, engine: str) -> None:
    few = row_of({**cells, "engine": engine, "zero_stage": "3", "note": ""}).setup
    many = replace(few, dp=2 * few.dp, nodes=1)
    few = replace(few, nodes=1)

    def held(setup: Setup) -> int:
        states = model_states(setup, stages(setup)[-1])
        return sum(component.bytes for component in (*states.at_rest, *states.gradients))

    assert held(many) <= held(few)


def test_a_row_may_state_the_number_of_parameters_alone() -> None:
    """Then it has the shape that is usual for as many: GPT-3's own of 6.7e9 has hidden 4096, 32 layers, 32 heads."""
    cells = dict.fromkeys(COLUMNS, "") | {"engine": "none", "mode": "full", "seq_len": "2048", "params_b": "6.7"}
    shape = row_of(cells).setup.shape
    assert [shape.hidden, shape.layers, shape.heads] == pytest.approx([4096, 32, 32], rel=0.05)
    assert shape.parameters == 6_700_000_000


def test_the_ranks_that_are_not_stated_are_those_that_remain() -> None:
    cells = dict.fromkeys(COLUMNS, "") | {"engine": "megatron", "mode": "full", "seq_len": "2048", "params_b": "6.7"}
    found, wrong = written({**cells, "n_gpus": "64", "tp": "4", "pp": "2"}, {**cells, "n_gpus": "64", "tp": "3"})
    assert found[0].setup.dp == 8
    assert [problem.split(": ", 1)[1] for problem in wrong] == ["n_gpus: 64 GPUs, but tp × pp × dp is 3"]


def test_an_unknown_card_has_no_more_memory_than_any_that_was_read() -> None:
    """With ECC a T4 of 16 GB shows 15109 MiB, an A10 of 24 GB 22731."""
    cells = dict.fromkeys(COLUMNS, "") | {"engine": "none", "mode": "full", "seq_len": "1", "params_b": "1"}
    for nominal, usable in (("16", 15109), ("24", 22731)):
        assert row_of({**cells, "gpu": "unheard of", "gpu_mem_gb": nominal}).setup.gpu_memory_mib <= usable


def test_a_row_without_an_outcome_is_neither_a_fit_nor_a_death() -> None:
    cells = dict.fromkeys(COLUMNS, "") | {"engine": "none", "mode": "full", "seq_len": "1", "params_b": "1"}
    found, _ = written({**cells, "use_fit": "1"}, {**cells, "use_fit": "1", "outcome": "ok"})
    score = evaluate(found).fit
    assert (score.rows, score.died, score.fitted) == (1, 0, 1)


@pytest.mark.parametrize("table", ["public_runs.csv", "blind_runs.csv"])
def test_the_test_sets_are_legal_rows(table: str) -> None:
    """Nothing is fitted on them, and they share no document with measured_runs.csv."""
    found, wrong = read_table(DATA / table)
    assert wrong == []
    for prediction in evaluate(found).predictions:
        assert_sound(prediction)
    documents = {row.source for row in read_table(DATA / "measured_runs.csv")[0]}
    assert not documents & {row.source for row in found}
