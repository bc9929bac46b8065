"""What a run leaves to read: ``metrics.jsonl``, ``samples.jsonl``, TensorBoard events, and a line a step.

TensorBoard tags under ``tb/``: ``loss/train`` and ``loss/eval`` (nats per target token), ``optimizer/lr``,
``optimizer/grad_norm`` (before clipping), ``optimizer/loss_scale``, ``speed/tokens_per_second`` (all ranks),
``data/tokens_seen``, and the text ``samples/N`` for prompt N.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Callable, Dict, Union

from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

from cpm_cluster.training.files import write_text
from cpm_cluster.training.settings import Settings

_TAGS = {
    "loss": "loss/train",
    "eval_loss": "loss/eval",
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "loss_scale": "optimizer/loss_scale",
    "tokens_per_second": "speed/tokens_per_second",
    "tokens_seen": "data/tokens_seen",
}
Record = Dict[str, Union[int, float, str, None]]


class Records:
    """Appends to the three records and prints, from rank 0; silent on other ranks."""

    def __init__(self, settings: Settings, rank: int, restored_step: int) -> None:
        """Drop what an earlier attempt recorded beyond ``restored_step``, then continue after it."""
        output_dir = Path(settings.output_dir)
        self._steps = settings.training.steps
        self._metrics = output_dir / "metrics.jsonl"
        self._samples = output_dir / "samples.jsonl"
        self._board: SummaryWriter | None = None
        if rank == 0:
            keep_lines(self._metrics, lambda step: step <= restored_step)
            # Samples before training stay once training has begun; those after the last step come again.
            keep_lines(self._samples, lambda step: step == 0 < restored_step)
            # tensorboardX names files by the second and would overwrite those of an attempt just ended.
            self._board = SummaryWriter(
                str(output_dir / "tb"), purge_step=restored_step + 1, filename_suffix=f".{os.getpid()}"
            )

    def metrics(self, record: Record) -> None:
        """Record one step."""
        if self._board is None:
            return
        _append(self._metrics, record)
        print(step_line(record, self._steps), flush=True)
        for key, tag in _TAGS.items():
            value = record.get(key)
            if value is not None:
                self._board.add_scalar(tag, value, record["step"], walltime=record["time"])
        self._board.flush()

    def sample(self, number: int, step: int, prompt: str, text: str) -> None:
        """Record what the model made of prompt ``number`` after ``step`` steps."""
        if self._board is None:
            return
        _append(self._samples, {"step": step, "prompt": prompt, "text": text})
        self._board.add_text(f"samples/{number}", f"**{prompt}**{text}", step)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._board is not None:
            self._board.close()


def step_line(record: Record, steps: int) -> str:
    """Return one step's record as people read it: ``step 20/300 loss 4.1234 lr 3.00e-04 …``.

    The gradient norm is "overflow" where fp16 skipped the step.
    """
    grad_norm, eval_loss = record["grad_norm"], record["eval_loss"]
    parts = [
        f"step {record['step']}/{steps}",
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        "grad_norm overflow" if grad_norm is None else f"grad_norm {grad_norm:.3f}",
        f"tokens/s {record['tokens_per_second']:.0f}",
    ]
    if eval_loss is not None:
        parts.append(f"eval_loss {eval_loss:.4f}")
    return " ".join(parts)


def keep_lines(path: Path, wanted: Callable[[int], bool]) -> None:
    """Rewrite a jsonl file atomically with the lines whose ``step`` is wanted; a torn last line goes, too."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    kept = [line for line in lines if line and _is_wanted(line, wanted)]
    write_text(path, "".join(line + "\n" for line in kept))


def _is_wanted(line: str, wanted: Callable[[int], bool]) -> bool:
    try:
        return wanted(int(json.loads(line)["step"]))
    except (ValueError, KeyError, TypeError):
        return False


def _append(path: Path, record: Record) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
