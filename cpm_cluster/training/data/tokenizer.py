"""Text to token ids and back: the CPM vocabulary format, and tokenizers of Hugging Face.

A CPM vocabulary file has one JSON string a line; the line number is the id. ``<unk>``, ``<s>``, ``</s>`` and
the byte tokens ``<0x00>`` … ``<0xFF>`` are special: they never match text, so ``<s>`` in a document stays
plain characters. Of all other pieces the longest that fits is taken, and bytes where none does.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Iterable, Protocol, Sequence

from pytrie import StringTrie  # type: ignore[import-untyped]

from cpm_cluster.training.errors import UserError

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPECIAL_TOKENS = (UNK, BOS, EOS, *BYTE_TOKENS)
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """Text to ids and back; ids are below ``size``, ``bos`` opens a document and ``eos`` closes it.

    Tokenizers of equal ``identity`` give equal ids.
    """

    size: int
    bos: int
    eos: int
    identity: str

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without ``bos`` and ``eos``; unpaired surrogates become "?"."""

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; special tokens are silent."""


class CpmTokenizer:
    """See :class:`Tokenizer`; any text survives the round trip."""

    def __init__(self, tokens: Sequence[str]) -> None:
        """Take the tokens in the order of ids; raises UserError on duplicates and missing special tokens."""
        ids = {token: number for number, token in enumerate(tokens)}
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing or len(ids) < len(tokens):
            what = "lacks {}".format(", ".join(missing[:3])) if missing else "lists a token twice"
            raise UserError(f"the vocabulary {what}")
        self.size = len(tokens)
        self.bos, self.eos = ids[BOS], ids[EOS]
        self.identity = hashlib.sha256(json.dumps(list(tokens)).encode("ascii")).hexdigest()
        self._byte_ids = [ids[token] for token in BYTE_TOKENS]
        self._byte_of = {number: byte for byte, number in enumerate(self._byte_ids)}
        special = set(SPECIAL_TOKENS)
        self._pieces = {number: token for token, number in ids.items() if token and token not in special}
        # A match is worth the id and how far to move on.
        self._trie = StringTrie((piece, (number, len(piece))) for number, piece in self._pieces.items())
        self._longest = _longest_by_first_character(self._pieces.values())

    def encode(self, text: str) -> list[int]:
        """See :class:`Tokenizer`."""
        match, longest = self._trie.longest_prefix_value, self._longest
        ids: list[int] = []
        start = 0
        while start < len(text):
            # Never the whole rest of the text: the time would grow with the square of its length.
            found = match(text[start : start + longest.get(text[start], 0)], None)
            if found is None:
                ids.extend(self._byte_ids[byte] for byte in text[start].encode("utf-8", "replace"))
                start += 1
            else:
                ids.append(found[0])
                start += found[1]
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`Tokenizer`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See :class:`Tokenizer`; broken bytes and unknown ids are U+FFFD."""
        parts: list[bytes] = []
        for number in ids:
            if number in self._byte_of:
                parts.append(bytes([self._byte_of[number]]))
            elif number in self._pieces:
                parts.append(self._pieces[number].encode("utf-8"))
            elif number >= self.size:
                parts.append(_REPLACEMENT.encode("utf-8"))
        return b"".join(parts).decode("utf-8", "replace")


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of a file, or of the name ``bytes`` (special tokens and bytes only).

    A file that ends in ``.json``, or a folder, is of Hugging Face; any other file is a CPM vocabulary.
    Raises UserError when it cannot be read or is not in its format.
    """
    if name == "bytes":
        return CpmTokenizer(SPECIAL_TOKENS)
    path = Path(name)
    if path.suffix == ".json" or path.is_dir():
        from cpm_cluster.training.data.huggingface_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the vocabulary {path}: {error}") from error
    tokens = [_parse_token(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    try:
        return CpmTokenizer(tokens)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _parse_token(path: Path, number: int, line: str) -> str:
    try:
        token = json.loads(line)
    except ValueError:
        token = None
    if not isinstance(token, str):
        raise UserError(f"{path}:{number}: expected one JSON string, got {line:.40}")
    return token


def _longest_by_first_character(pieces: Iterable[str]) -> dict[str, int]:
    longest: dict[str, int] = {}
    for piece in pieces:
        longest[piece[0]] = max(longest.get(piece[0], 0), len(piece))
    return longest
