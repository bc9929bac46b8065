"""What every task begins with: the output directory without an earlier attempt's end, and the tokenizer."""

from __future__ import annotations

from pathlib import Path

from cpm_cluster.training.errors import UserError, clear_errors
from cpm_cluster.training.heartbeat import clear_heartbeats
from cpm_cluster.training.placement import Placement
from cpm_cluster.training.settings import Settings
from cpm_cluster.training.tokenizer import Tokenizer, load_tokenizer


def prepare(output_dir: Path, placement: Placement) -> None:
    """Make the output directory and remove what an earlier attempt said about its end."""
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


def open_tokenizer(settings: Settings) -> Tokenizer:
    """Return the tokenizer; raises UserError when the model has no embedding for some of its ids."""
    tokenizer = load_tokenizer(settings.tokenizer)
    if tokenizer.size > settings.model.vocab:
        raise UserError(
            f"the tokenizer {settings.tokenizer} has {tokenizer.size} ids but model.vocab is {settings.model.vocab}"
        )
    return tokenizer
