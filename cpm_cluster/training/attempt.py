"""What every task begins and ends with: the output directory, whoever watches it, the tokenizer, and the outcome."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, NamedTuple

from cpm_cluster.training.data.tokenizer import Tokenizer, load_tokenizer
from cpm_cluster.training.errors import UserError, clear_errors
from cpm_cluster.training.files import write_json
from cpm_cluster.training.placement import Placement, expect_world_size
from cpm_cluster.training.reporting.heartbeat import Heartbeat, clear_heartbeats
from cpm_cluster.training.reporting.progress import Progress
from cpm_cluster.training.settings import Settings
from cpm_cluster.training.stop import StopRequest


class Attempt(NamedTuple):
    """One start of a task on this rank: whether it is asked to stop, and where it says how far it has come."""

    output_dir: Path
    stop: StopRequest
    progress: Progress
    heartbeat: Heartbeat


@contextmanager
def attempt(settings: Settings, placement: Placement, **progress: object) -> Iterator[Attempt]:
    """Make the output directory, without what an earlier attempt said about its end, and begin; tell of a failure.

    ``progress`` holds what ``progress.json`` says at first. Raises UserError when the directory cannot be made, or the
    launcher started another number of ranks.
    """
    output_dir = Path(settings.output_dir)
    _clear(output_dir, placement)
    begun = Attempt(
        output_dir, StopRequest(output_dir), Progress(settings, placement.rank), Heartbeat(output_dir, placement.rank)
    )
    try:
        begun.progress.enter("loading", **progress)
        expect_world_size(placement, settings.expected_world_size)
        yield begun
    except Exception:
        begun.heartbeat.close("failed")
        begun.progress.enter("failed")
        raise


def _clear(output_dir: Path, placement: Placement) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {output_dir} cannot be made: {error.strerror}") from error
    clear_errors(output_dir, placement.rank, placement.world_size)
    if placement.rank == 0:
        clear_heartbeats(output_dir, placement.world_size)
    outcome = output_dir / "outcome.json"
    if placement.rank == 0 and outcome.exists():
        outcome.unlink()


def write_outcome(
    output_dir: Path, outcome: str, step: int, checkpoint_step: int | None = None, final_loss: float | None = None
) -> None:
    """Write ``outcome.json``: "finished" or "stopped", and after what. Rank 0 alone."""
    content = {"outcome": outcome, "step": step, "checkpoint_step": checkpoint_step, "final_loss": final_loss}
    write_json(output_dir / "outcome.json", content)


def open_tokenizer(settings: Settings) -> Tokenizer:
    """Return the tokenizer; raises UserError when the model has no embedding for some of its ids."""
    tokenizer = load_tokenizer(settings.tokenizer)
    if tokenizer.size > settings.model.vocab:
        raise UserError(
            f"the tokenizer {settings.tokenizer} has {tokenizer.size} ids but model.vocab is {settings.model.vocab}"
        )
    return tokenizer
