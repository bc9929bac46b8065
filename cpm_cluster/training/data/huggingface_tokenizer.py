"""Tokenizers of Hugging Face: ``tokenizer.json``, read by the package ``tokenizers``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Iterable, Sequence

from cpm_cluster.training.errors import UserError

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
# What a document starts and ends with where tokenizer_config.json is not there to say it.
_USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>")
_USUAL_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>")


class HuggingFaceTokenizer:
    """See :class:`cpm_cluster.training.data.tokenizer.Tokenizer`; the round trip is as good as the tokenizer's own."""

    def __init__(self, path: Path) -> None:
        """Read ``tokenizer.json``, or the one in a folder, and the names of its special tokens beside it.

        A tokenizer without a token that opens a document opens it with the one that closes it, as GPT-2 does.
        Raises UserError when the package is missing, the file is broken, or nothing closes a document.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(f"the tokenizer {path} needs the package tokenizers: pip install tokenizers") from error
        file = path / _FILE if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"the tokenizer {path}: there is no file {file}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - the package raises bare exceptions
            raise UserError(f"{file} is not a tokenizer: {error}") from error
        # Whatever a document says is plain text, "</s>" included.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = 1 + max(self._ids.values())
        config = _read_config(file.parent / _CONFIG)
        eos = self._special(config.get("eos_token"), _USUAL_EOS)
        if eos is None:
            raise UserError(f"{file}: which token ends a document? Name it as eos_token in {file.parent / _CONFIG}")
        bos = self._special(config.get("bos_token"), () if config else _USUAL_BOS)
        self.bos, self.eos = eos if bos is None else bos, eos
        text = f"{self._tokenizer.to_str()} {self.bos} {self.eos} {tokenizers.__version__}"
        self.identity = hashlib.sha256(text.encode("utf-8")).hexdigest()

    def encode(self, text: str) -> list[int]:
        """See :class:`cpm_cluster.training.data.tokenizer.Tokenizer`."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`cpm_cluster.training.data.tokenizer.Tokenizer`; on all cores that RAYON_NUM_THREADS allows."""
        whole = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        return [list(item.ids) for item in self._tokenizer.encode_batch(whole, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """See :class:`cpm_cluster.training.data.tokenizer.Tokenizer`; unknown ids are silent."""
        text: str = self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=True)
        return text

    def _special(self, named: object, usual: Sequence[str]) -> int | None:
        """Return the id of a token given as text or as ``{"content": text}``, else of a usual one."""
        text = named.get("content") if isinstance(named, dict) else named
        for token in [text] if isinstance(text, str) else usual:
            if token in self._ids:
                return self._ids[token]
        return None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}
