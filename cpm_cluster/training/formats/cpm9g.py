"""CPM-9G's own weights: a dictionary of tensors in a ``.pt`` file, or cut into several in one folder."""

from __future__ import annotations

from pathlib import Path

from cpm_cluster.training.formats.tensor_files import LazyTensors, open_files


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder that may hold weights."""
    return sorted(folder.glob("*.pt"))


def read_cpm9g(path: Path) -> LazyTensors:
    """Return the weights of a file, or of all ``.pt`` files of a folder.

    Raises UserError when one cannot be read, or two hold tensors of one name.
    """
    return open_files(weight_files(path) if path.is_dir() else [path])
