"""A run's weights for others: Hugging Face's Llama layout, CPM-9G's ``.pt``, or the LoRA updates alone.

A folder appears when all of it is written. Beside the weights it holds the tokenizer where its files are here, and
``export.json``: run, step and number type, and for a merged adapter how far its logits are from the trained ones.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch

from cpm_cluster.training.data.tokenizer import load_tokenizer
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import write_json
from cpm_cluster.training.formats import huggingface
from cpm_cluster.training.formats.loading import read_adapter, read_base_weights
from cpm_cluster.training.formats.opendelta import write_opendelta
from cpm_cluster.training.formats.peft import write_peft
from cpm_cluster.training.formats.tensor_files import (
    EXPORT_RECORD,
    Tensors,
    as_type,
    new_folder,
    read_json_object,
    require_room,
    sync_file,
    write_torch_file,
)
from cpm_cluster.training.model.decoder import check_weights
from cpm_cluster.training.model.lora import Delta, check_delta, merged
from cpm_cluster.training.probe import require_equal
from cpm_cluster.training.trained import Recipe, Trained, read_recipe, read_trained, shapes_of

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)


class Wanted(NamedTuple):
    """What to export of a run: ``dtype`` and ``step`` None are those of the weights, and the last.

    ``adapter``: LoRA updates from elsewhere that take the place of the run's.
    """

    run: Path
    format: str
    output: Path
    merge: bool
    dtype: str | None
    step: int | None
    replace: bool
    adapter: Path | None = None


# Where the file of the settings lies that is called so inside the run's container.
Locate = Callable[[str], Path]
# What is being done, how much of it is done, and how much there is.
Note = Callable[[str, int, int], None]


def export(wanted: Wanted, locate: Locate, note: Note) -> dict[str, Any]:
    """Write the folder and return its record; raises UserError, before it begins where that can be known."""
    require_room(wanted.output, wanted.replace)
    recipe = read_recipe(wanted.run)
    _require_possible(wanted, recipe)
    if wanted.adapter is None:
        trained = read_trained(wanted.run, recipe, wanted.step)
        delta = Delta(trained.tensors, recipe.lora.alpha) if recipe.lora else None
    else:
        delta = read_adapter(wanted.adapter)
        trained = Trained(None, delta.factors, wanted.adapter)
    with new_folder(wanted.output, wanted.replace) as folder:
        exporter = _Exporter(wanted, recipe, trained, folder, locate, note)
        record = exporter.write(delta)
        write_json(folder / EXPORT_RECORD, record)
    return {"folder": str(wanted.output), **record}


def _require_possible(wanted: Wanted, recipe: Recipe) -> None:
    lora = recipe.lora is not None or wanted.adapter is not None
    if wanted.adapter is not None and wanted.step is not None:
        raise UserError("--adapter takes the place of what the run has trained, so that --step has no meaning")
    if wanted.adapter is None and recipe.task not in ("pretrain", "finetune"):
        raise UserError(f"{wanted.run} has trained nothing: its task was {recipe.task}")
    if wanted.format == "lora" and (wanted.merge or not lora):
        why = "--merge makes whole weights of them" if lora else "this run has trained all weights"
        raise UserError(f"--format lora writes LoRA updates alone: {why}; use --format hf or cpm9g")
    if wanted.format != "lora" and lora and not wanted.merge:
        raise UserError("these are LoRA updates: fold them into the base with --merge, or use --format lora")
    if wanted.merge and not lora:
        raise UserError("--merge: this run has trained all weights, there is nothing to fold into them")


class _Exporter:
    """One export into one folder."""

    def __init__(
        self, wanted: Wanted, recipe: Recipe, trained: Trained, folder: Path, locate: Locate, note: Note
    ) -> None:
        self._wanted, self._recipe, self._trained, self._folder = wanted, recipe, trained, folder
        self._locate, self._note = locate, note
        self._warnings: list[str] = []
        self._record: dict[str, Any] = {}

    def write(self, delta: Delta | None) -> dict[str, Any]:
        """Write everything but the record, and return that."""
        if delta is None:
            dtype = self._write_weights(self._trained.tensors, None)
        elif self._wanted.merge:
            dtype = self._write_merged(delta)
        else:
            dtype = self._write_adapter(delta)
        return {
            "run": self._wanted.run.name,
            "step": self._trained.step,
            "format": self._wanted.format,
            "dtype": str(dtype).split(".")[-1],
            "from": str(self._trained.source),
            **self._record,
            "files": sorted(path.name for path in self._folder.iterdir()),
            "warnings": self._warnings,
        }

    def _write_adapter(self, delta: Delta) -> torch.dtype:
        """Write PEFT's files and OpenDelta's: both are small."""
        check_delta(shapes_of(self._recipe.model), delta)
        factors, dtype = self._typed(delta.factors)
        delta = Delta(factors, delta.alpha)
        base = self._recipe.init_from
        folder = base if base is not None and self._locate(base).is_dir() else None
        counted = self._counter("writing", 2 * len(factors))
        dropout = self._recipe.lora.dropout if self._recipe.lora else 0.0
        write_peft(self._folder, delta, dropout, folder, counted)
        write_opendelta(self._folder / f"{self._recipe.model.name}-delta.pt", delta, counted)
        return dtype

    def _write_merged(self, delta: Delta) -> torch.dtype:
        """Write base and updates as one, and read them again: they must be the model that was trained."""
        model, source = self._recipe.model, self._recipe.init_from
        if source is None:
            raise UserError("--merge: init_from is not set: the base was random, and is not kept; use --format lora")
        path = self._locate(source)
        if not path.exists():
            raise UserError(f"--merge: the base weights {path} are not here")
        base = read_base_weights(str(path), model)
        check_weights(shapes_of(model), model, base, str(path))
        # Rounded once, to the type that is wanted.
        exact = base if self._wanted.dtype is None else as_type(base, torch.float32)
        dtype = self._write_weights(merged(exact, delta), path)
        self._note("comparing with the trained model", 0, 1)
        written = read_base_weights(str(self._folder), model)
        difference = require_equal(model, base, delta, written)
        self._note("comparing with the trained model", 1, 1)
        self._record = {"base": source, "logits": difference._asdict()}
        return dtype

    def _write_weights(self, weights: Tensors, base: Path | None) -> torch.dtype:
        """Write whole weights in the format that is wanted, and the tokenizer."""
        weights, dtype = self._typed(weights)
        counted = self._counter("writing", len(weights))
        model = self._recipe.model
        bos, eos = self._copy_tokenizer()
        if self._wanted.format == "cpm9g":
            write_torch_file(self._folder / f"{model.name}.pt", weights, counted)
        else:
            positions = max(self._recipe.seq_len, _positions_of(base))
            huggingface.write_config(self._folder, model, dtype, positions, bos, eos)
            huggingface.write_weights(self._folder, weights, counted)
        return dtype

    def _typed(self, tensors: Tensors) -> tuple[Tensors, torch.dtype]:
        """Return the tensors in the number type that is wanted, else as they are, and that type."""
        dtype = TYPES[self._wanted.dtype] if self._wanted.dtype else tensors[next(iter(tensors))].dtype
        return as_type(tensors, dtype), dtype

    def _counter(self, what: str, total: int) -> Callable[[str], None]:
        done = 0

        def counted(name: str) -> None:
            nonlocal done
            done += 1
            self._note(what, done, total)

        return counted

    def _copy_tokenizer(self) -> tuple[int | None, int | None]:
        """Copy the tokenizer's files, and return the ids that open and close a document; none if they are not here."""
        name = self._recipe.tokenizer
        path = Path(name) if name == "bytes" else self._locate(name)
        try:
            tokenizer = load_tokenizer(str(path))
        except UserError as error:
            self._warnings.append(f"without a tokenizer: {error}")
            return None, None
        if path.is_dir() or path.suffix == ".json":
            folder = path if path.is_dir() else path.parent
            files = {file: folder / file for file in _TOKENIZER_FILES if (folder / file).is_file()}
            files["tokenizer.json"] = path / "tokenizer.json" if path.is_dir() else path
        else:
            files = {} if name == "bytes" else {"vocab.txt": path}
        for target, source in files.items():
            shutil.copyfile(source, self._folder / target)
            sync_file(self._folder / target)
        return tokenizer.bos, tokenizer.eos


def _positions_of(base: Path | None) -> int:
    """Return the longest text that a base of Hugging Face's has seen; nothing is known of others."""
    if base is None or not (base / huggingface.CONFIG).is_file():
        return 0
    positions = read_json_object(base / huggingface.CONFIG).get("max_position_embeddings")
    return positions if isinstance(positions, int) else 0
