"""Tensors by name, read when they are asked for; files and folders of them that are whole or absent.

Torch's files and those of safetensors are mapped into memory: ranks of one host share what they read.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import shutil
import tempfile
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import sync_directory, write_atomically

Tensors = Mapping[str, Tensor]
Reader = Callable[[], Tensor]

EXPORT_RECORD = "export.json"


class LazyTensors(Mapping[str, Tensor]):
    """A mapping of names to tensors, each of which its reader gives anew."""

    def __init__(self, readers: Mapping[str, Reader]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self._readers)

    def __len__(self) -> int:
        """Count them."""
        return len(self._readers)


def changed(tensors: Tensors, change: Callable[[str, Tensor], Tensor]) -> LazyTensors:
    """Return the tensors with a change to each, made when it is read."""

    def read(name: str) -> Tensor:
        return change(name, tensors[name])

    return LazyTensors({name: partial(read, name) for name in tensors})


def as_type(tensors: Tensors, dtype: torch.dtype) -> LazyTensors:
    """Return the tensors in another number type; reading one raises UserError where a number does not fit into it."""

    def convert(name: str, tensor: Tensor) -> Tensor:
        converted = tensor.to(dtype)
        if dtype == torch.float16 and bool((torch.isfinite(tensor) & ~torch.isfinite(converted)).any()):
            raise UserError(f"{name} holds numbers beyond the 65504 of fp16; export it as bf16 or fp32")
        return converted

    return changed(tensors, convert)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return a dictionary of tensors on the CPU, without running code from the file; mapped where torch can (2.1).

    Raises UserError when the file cannot be read or holds anything else.
    """
    try:
        mapped = zipfile.is_zipfile(path) and "mmap" in inspect.signature(torch.load).parameters
        options = {"mmap": True} if mapped else {}
        tensors = torch.load(path, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # torch raises many kinds here: OSError, UnpicklingError, RuntimeError, …
        raise UserError("cannot read weights from {}: {}".format(path, str(error).split("\n")[0])) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} is not a dictionary of tensors")
    return tensors


def open_files(files: Sequence[Path]) -> LazyTensors:
    """Return the tensors of several files, of safetensors or of torch, together.

    Raises UserError when one cannot be read, or two hold tensors of one name.
    """
    readers: dict[str, Reader] = {}
    for file in files:
        found = _open_safetensors(file) if file.suffix == ".safetensors" else read_tensors(file)
        twice = next((name for name in found if name in readers), None)
        if twice is not None:
            raise UserError(f"{file} holds {twice}, which another file beside it holds, too")
        readers.update({name: partial(found.__getitem__, name) for name in found})
    return LazyTensors(readers)


def _open_safetensors(path: Path) -> LazyTensors:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        file: Any = safe_open(str(path), framework="pt")
        return LazyTensors({name: partial(file.get_tensor, name) for name in file.keys()})  # noqa: SIM118 - no mapping
    except Exception as error:  # the package raises its own kind, and OSError
        raise UserError("cannot read weights from {}: {}".format(path, str(error).split("\n")[0])) from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write and sync a file that transformers reads; raises OSError that names it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path), {"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error
    # It makes files for nobody but whoever runs it, whatever the umask.
    os.chmod(path, mode)
    sync_file(path)


def write_torch_file(path: Path, tensors: Tensors, note: Callable[[str], None]) -> None:
    """Write a dictionary of tensors as torch does, atomically; ``note`` hears of each.

    One tensor at a time is in memory: torch wants all of them before it writes the first, so they wait on the disk,
    which must have room for the file twice.
    """
    waiting = {}
    for name in tensors:
        waiting[name] = _on_disk(tensors[name], path.parent)
        note(name)
    write_atomically(path, partial(torch.save, waiting))


def _on_disk(tensor: Tensor, folder: Path) -> Tensor:
    """Return a copy whose memory is a file without a name, gone with the tensor or the process."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        # A mapped file that finds the disk full kills the process; this raises OSError before.
        os.posix_fallocate(file.fileno(), 0, max(1, tensor.numel() * tensor.element_size()))
        copy = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)


def sync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def new_folder(path: Path, replace: bool) -> Iterator[Path]:
    """Give a folder to write into, which then takes the place of ``path``, or never appears there.

    Raises UserError when there is something: even ``replace`` replaces nothing but an earlier export.
    """
    require_room(path, replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    earlier = path.with_name(f".{path.name}.{os.getpid()}.earlier")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        sync_directory(unfinished)
        if path.exists():
            os.rename(path, earlier)
        os.rename(unfinished, path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)


def require_room(path: Path, replace: bool) -> None:
    """Raise UserError unless a folder can be made, or an earlier export be replaced."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / EXPORT_RECORD).is_file():
        raise UserError(f"{path} exists and is no export; choose another folder")
    if not replace:
        raise UserError(f"{path} is an earlier export; choose another folder, or replace it (--force)")


def read_json_object(path: Path) -> dict[str, object]:
    """Return the object in a JSON file; raises UserError when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value
