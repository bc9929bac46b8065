"""LoRA updates as CPM-9G's scripts keep them through OpenDelta: ``NAME-delta.pt``, our names, no alpha.

CPM-9G trains with ``--lora-alpha 64`` where nothing else is said, and its ``merge_lora_delta.py`` takes alpha to be
64; so a delta that leaves here has that alpha, the ratio of ours to it being multiplied into each B.
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable

from torch import Tensor

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.formats.tensor_files import changed, read_tensors, write_torch_file
from cpm_cluster.training.model.lora import FACTOR_B, Delta, is_factor

ALPHA = 64.0


def read_opendelta(path: Path, alpha: float = ALPHA) -> Delta:
    """Return the updates in a file, for that alpha; raises UserError when it cannot be read or holds anything else."""
    factors = read_tensors(path)
    other = next((name for name in factors if not is_factor(name)), None)
    if other is not None or not factors:
        raise UserError(f"{path} is no LoRA delta: {other or 'nothing'} is in it")
    return Delta(factors, alpha, alpha_is_assumed=True)


def write_opendelta(path: Path, delta: Delta, note: Callable[[str], None]) -> None:
    """Write the updates for an alpha of 64."""

    def rescale(name: str, factor: Tensor) -> Tensor:
        return factor * (delta.alpha / ALPHA) if name.endswith(FACTOR_B) else factor

    write_torch_file(path, changed(delta.factors, rescale), note)
