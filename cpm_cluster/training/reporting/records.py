"""What a run leaves to read: ``metrics.jsonl``, ``samples.jsonl``, TensorBoard events, a line a step, and events.

A line of ``metrics.jsonl`` every ``log_every`` steps has the keys of ``_TAGS``, which are the TensorBoard tags under
``tb/``, and ``time``, ``step`` and ``events``: what the loss guard did since the last line, one text each. Its units:

* ``loss/train``, ``loss/eval``: nats per target token; ``loss/eval/NAME``, ``eval_losses`` in the line: those of each
  of several sources, by the names of their files
* ``optimizer/lr``, ``optimizer/grad_norm`` (before clipping; missing where it is no number), ``optimizer/loss_scale``
* ``speed/tokens_per_second`` of all ranks, ``speed/tokens_per_second_per_rank``, ``speed/step_seconds``, ``speed/mfu``
  (a fraction): over the last twenty steps, evaluation and saving left out
* ``speed/data_seconds``: a step's wait for data, of the rank that waited longest
* ``speed/checkpoint_seconds``: how long training stood still for checkpoints since the last line, of that rank
* ``memory/allocated_bytes``, ``memory/reserved_bytes`` (GPU), ``memory/resident_bytes`` (host): a rank's peak, the
  fullest rank's
* ``stragglers/slowest_rank``, ``stragglers/forward_seconds`` (the median rank's own layers in the forward pass of a
  micro batch), ``stragglers/slowest_over_median``
* ``data/tokens_seen``, ``guard/events`` (steps not accepted so far)

Texts are ``samples/N`` for prompt N, and ``guard/event``. ``events/trainer.jsonl`` has each of the guard's events with
its time, also those before a rollback.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Callable, Dict

from cpm_cluster.training.files import naming, write_text
from cpm_cluster.training.guard import Incident
from cpm_cluster.training.reporting.board import Board
from cpm_cluster.training.settings import Settings

_TAGS = {
    "loss": "loss/train",
    "eval_loss": "loss/eval",
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "loss_scale": "optimizer/loss_scale",
    "tokens_per_second": "speed/tokens_per_second",
    "tokens_per_second_per_rank": "speed/tokens_per_second_per_rank",
    "step_seconds": "speed/step_seconds",
    "mfu": "speed/mfu",
    "data_seconds": "speed/data_seconds",
    "checkpoint_seconds": "speed/checkpoint_seconds",
    "memory_allocated_bytes": "memory/allocated_bytes",
    "memory_reserved_bytes": "memory/reserved_bytes",
    "memory_resident_bytes": "memory/resident_bytes",
    "slowest_rank": "stragglers/slowest_rank",
    "forward_seconds": "stragglers/forward_seconds",
    "slowest_over_median": "stragglers/slowest_over_median",
    "tokens_seen": "data/tokens_seen",
    "guard_events": "guard/events",
}
_SECONDS_BETWEEN_FLUSHES = 1.0
Record = Dict[str, Any]


class Records:
    """Appends to the records and prints, from rank 0; silent on other ranks."""

    def __init__(self, settings: Settings, rank: int, restored_step: int) -> None:
        """Drop what an earlier attempt recorded beyond ``restored_step``, then continue after it."""
        self._output_dir = Path(settings.output_dir)
        self._steps = settings.training.steps
        self._metrics = self._output_dir / "metrics.jsonl"
        self._samples = self._output_dir / "samples.jsonl"
        self._events: list[str] = []
        self._board: Board | None = None
        self._flushed_at = 0.0
        if rank == 0:
            # Samples before training stay once training has begun; those after the last step come again.
            keep_lines(self._samples, lambda step: step == 0 < restored_step)
            self._continue_after(restored_step)

    def metrics(self, record: Record) -> None:
        """Record one step."""
        if self._board is None:
            return
        record = {**{key: finite_or_none(value) for key, value in record.items()}, "events": self._events}
        of_sources = {name: finite_or_none(loss) for name, loss in record.get("eval_losses", {}).items()}
        record["eval_losses"] = of_sources
        self._events = []
        _append(self._metrics, record)
        print(step_line(record, self._steps), flush=True)
        known = {tag: record[key] for key, tag in _TAGS.items() if record.get(key) is not None}
        known.update({f"loss/eval/{name}": loss for name, loss in of_sources.items() if loss is not None})
        self._board.scalars(known, record["step"], record["time"])
        if time.monotonic() - self._flushed_at > _SECONDS_BETWEEN_FLUSHES:
            self._board.flush()
            self._flushed_at = time.monotonic()

    def incident(self, incident: Incident, rolled_back_to: int | None) -> None:
        """Record what the loss guard did; after a rollback the steps beyond it will be recorded once more."""
        if self._board is None:
            return
        print(f"guard: {incident.text}", flush=True)
        self._events.append(incident.text)
        event = {"time": time.time(), "kind": "guard", **incident._asdict(), "rolled_back_to": rolled_back_to}
        (self._output_dir / "events").mkdir(exist_ok=True)
        _append(self._output_dir / "events" / "trainer.jsonl", event)
        if rolled_back_to is not None:
            self._board.close()
            self._continue_after(rolled_back_to)
        self._board.text("guard/event", incident.text, incident.step if rolled_back_to is None else rolled_back_to)

    def _continue_after(self, step: int) -> None:
        """Make what is recorded end with a step."""
        keep_lines(self._metrics, lambda recorded: recorded <= step)
        self._board = Board(self._output_dir / "tb", step)

    def sample(self, number: int, step: int, prompt: str, text: str) -> None:
        """Record what the model made of prompt ``number`` after ``step`` steps."""
        if self._board is None:
            return
        _append(self._samples, {"step": step, "prompt": prompt, "text": text})
        self._board.text(f"samples/{number}", f"**{prompt}**{text}", step)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._board is not None:
            self._board.close()


def step_line(record: Record, steps: int) -> str:
    """Return one step's record as people read it: ``step 20/300 loss 4.1234 lr 3.00e-04 …``.

    The gradient norm is "overflow" where it is no number, as when fp16 skipped the step.
    """
    loss, grad_norm = record["loss"], record["grad_norm"]
    parts = [
        f"step {record['step']}/{steps}",
        "loss nan" if loss is None else f"loss {loss:.4f}",
        f"lr {record['lr']:.2e}",
        "grad_norm overflow" if grad_norm is None else f"grad_norm {grad_norm:.3f}",
        f"tokens/s {record['tokens_per_second']:.0f}",
    ]
    if record.get("mfu") is not None:
        parts.append(f"mfu {record['mfu']:.3f}")
    if record.get("eval_loss") is not None:
        parts.append(f"eval_loss {record['eval_loss']:.4f}")
    return " ".join(parts)


def finite_or_none(value: Any) -> Any:
    """Return None for a float that is no number, which JSON has not; any other value as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
