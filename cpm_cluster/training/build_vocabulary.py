"""Make a CPM vocabulary from text: ``python -m cpm_cluster.training.build_vocabulary OUT SOURCE…``.

A source is a jsonl file of ``{"input", "output"}`` rows, or ``builtin:python-reference``. Pieces are found by
byte-pair merging over words (Sennrich et al. 2016, with characters for bytes); the result depends on nothing
but text and size.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Iterable, Tuple

from cpm_cluster.training.data.corpus import read_rows
from cpm_cluster.training.data.tokenizer import SPECIAL_TOKENS
from cpm_cluster.training.errors import EXIT_USER_ERROR, UserError
from cpm_cluster.training.files import write_text

# CPM's prompt markers are pieces of their own in the original vocabulary, too.
_MARKERS = ("<用户>", "<AI>")
# A word with the blank before it; runs without blanks (Chinese) are cut so that merging stays cheap.
_WORD = re.compile(r" ?\w{1,24}| ?[^\w\s]{1,8}|\s")

Pair = Tuple[str, str]


def build_vocabulary(texts: Iterable[str], size: int) -> list[str]:
    """Return ``size`` tokens: special tokens, markers, characters by frequency, then merged pieces.

    Fewer come back when the text has no pair left that occurs twice. Raises UserError when ``size`` cannot
    hold the special tokens.
    """
    tokens = [*SPECIAL_TOKENS, *_MARKERS]
    if size < len(tokens):
        raise UserError(f"a vocabulary needs at least {len(tokens)} entries, not {size}")
    words: Counter[str] = Counter()
    for text in texts:
        words.update(_WORD.findall(text))
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    tokens += sorted((c for c in characters if characters[c] > 1), key=lambda c: (-characters[c], c))
    return tokens[:size] + _merged_pieces(words, set(tokens), max(0, size - len(tokens)))


def _merged_pieces(words: Counter[str], known: set[str], wanted: int) -> list[str]:
    """Merge the most frequent pair until ``wanted`` new pieces exist; code-point order breaks ties."""
    splits = [list(word) for word in words]
    weights = list(words.values())
    counts: Counter[Pair] = Counter()
    holders: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, parts in enumerate(splits):
        _count(parts, weights[index], index, counts, holders)
    pieces: list[str] = []
    while len(pieces) < wanted and counts:
        pair = max(counts, key=lambda item: (counts[item], item))
        if counts[pair] < 2:
            break
        for index in holders.pop(pair):
            _count(splits[index], -weights[index], index, counts, holders)
            splits[index] = _merge(splits[index], pair)
            _count(splits[index], weights[index], index, counts, holders)
        del counts[pair]
        if "".join(pair) not in known:
            known.add("".join(pair))
            pieces.append("".join(pair))
    return pieces


def _count(
    parts: list[str], weight: int, index: int, counts: Counter[Pair], holders: defaultdict[Pair, set[int]]
) -> None:
    for pair in zip(parts, parts[1:]):
        counts[pair] += weight
        if weight > 0:
            holders[pair].add(index)


def _merge(parts: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def main() -> int:
    """Write a vocabulary file; return the exit code."""
    parser = argparse.ArgumentParser(description="Make a CPM vocabulary from text.")
    parser.add_argument("output", type=Path, help="file to write, one JSON string a line")
    parser.add_argument("source", nargs="+", help="jsonl file, or builtin:python-reference")
    parser.add_argument("--size", type=int, default=2048, help="number of entries (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        rows = read_rows(arguments.source, "train")
        tokens = build_vocabulary((part for row in rows for part in row), arguments.size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    write_text(arguments.output, "".join(json.dumps(token, ensure_ascii=False) + "\n" for token in tokens))
    print(f"{arguments.output}: {len(tokens)} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
