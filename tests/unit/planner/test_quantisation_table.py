"""A course's table of GPU memory for ChatGLM-6B by precision: inference with few dialogues, and LoRA."""

from __future__ import annotations

import pytest
from planned_shapes import CHATGLM_6B

from cpm_cluster.planner.gpu_memory import gpu_memory
from cpm_cluster.planner.setup import Setup

GB = 10**9
FEW_DIALOGUES = 256  # tokens


def inference(precision: str) -> Setup:
    return Setup(shape=CHATGLM_6B, mode="infer", precision=precision, seq_len=FEW_DIALOGUES)


def tuning(precision: str) -> Setup:
    return Setup(
        shape=CHATGLM_6B,
        mode="qlora" if precision.startswith("int") else "lora",
        lora_rank=8,
        lora_targets=("qkv",),
        precision=precision,
        seq_len=FEW_DIALOGUES,
        recompute="full",
    )


@pytest.mark.parametrize(("precision", "gb"), [("fp16", 13), ("int8", 8), ("int4", 6)])
def test_inference_takes_what_the_table_says_to_its_whole_gigabyte(precision: str, gb: int) -> None:
    assert gpu_memory(inference(precision)).binding.bytes / GB == pytest.approx(gb, abs=1)


@pytest.mark.parametrize(("precision", "gb"), [("fp16", 14), ("int8", 9), ("int4", 7)])
def test_so_does_lora(precision: str, gb: int) -> None:
    assert gpu_memory(tuning(precision)).binding.bytes / GB == pytest.approx(gb, abs=1)


@pytest.mark.parametrize(("setup", "gb"), [(inference("fp32"), 20), (tuning("fp32"), 22)])
def test_its_full_precision_rows_are_less_than_the_weights_alone(setup: Setup, gb: int) -> None:
    """An error of the table, which the planner must not learn."""
    weights = 4 * CHATGLM_6B.parameters
    assert weights > gb * GB
    assert gpu_memory(setup).low > weights
