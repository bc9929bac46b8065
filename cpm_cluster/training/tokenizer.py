"""The CPM vocabulary format: greedy longest match over listed pieces, bytes for everything else.

A vocabulary file has one JSON string a line; the line number is the id. ``<unk>``, ``<s>``, ``</s>`` and the
byte tokens ``<0x00>`` … ``<0xFF>`` are special: they never match text, so ``<s>`` in a document stays plain
characters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Iterable, Sequence

from cpm_cluster.training.errors import UserError

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPECIAL_TOKENS = (UNK, BOS, EOS, *BYTE_TOKENS)
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """Text to ids and back; any text survives the round trip."""

    def __init__(self, tokens: Sequence[str]) -> None:
        """Take the tokens in the order of ids; raises UserError on duplicates and missing special tokens."""
        ids = {token: number for number, token in enumerate(tokens)}
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing or len(ids) < len(tokens):
            what = "lacks {}".format(", ".join(missing[:3])) if missing else "lists a token twice"
            raise UserError(f"the vocabulary {what}")
        self.size = len(tokens)
        self.bos, self.eos = ids[BOS], ids[EOS]
        self._byte_ids = [ids[token] for token in BYTE_TOKENS]
        self._byte_of = {number: byte for byte, number in enumerate(self._byte_ids)}
        special = set(SPECIAL_TOKENS)
        self._ids = {token: number for token, number in ids.items() if token not in special}
        self._pieces = {number: piece for piece, number in self._ids.items()}
        self._longest = _longest_by_first_character(self._ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without ``<s>`` and ``</s>``; unpaired surrogates become "?"."""
        ids: list[int] = []
        start = 0
        while start < len(text):
            for end in range(min(len(text), start + self._longest.get(text[start], 0)), start, -1):
                piece = self._ids.get(text[start:end])
                if piece is not None:
                    ids.append(piece)
                    start = end
                    break
            else:
                ids.extend(self._byte_ids[byte] for byte in text[start].encode("utf-8", "replace"))
                start += 1
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; special tokens are silent, broken bytes and unknown ids are U+FFFD."""
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
    """Return the tokenizer of a vocabulary file, or of the name ``bytes`` (special tokens and bytes only).

    Raises UserError when the file cannot be read or is not in the CPM format.
    """
    if name == "bytes":
        return Tokenizer(SPECIAL_TOKENS)
    path = Path(name)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the vocabulary {path}: {error}") from error
    tokens = [_parse_token(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    try:
        return Tokenizer(tokens)
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
        if piece:
            longest[piece[0]] = max(longest.get(piece[0], 0), len(piece))
    return longest
