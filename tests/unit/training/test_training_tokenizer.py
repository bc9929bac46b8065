"""The CPM vocabulary format, and a vocabulary made from text."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_cluster.training.build_vocabulary import build_vocabulary
from cpm_cluster.training.data.corpus import PYTHON_REFERENCE, read_rows
from cpm_cluster.training.data.tokenizer import SPECIAL_TOKENS, CpmTokenizer, load_tokenizer
from cpm_cluster.training.errors import UserError

SHIPPED = Path(__file__).parents[3] / "configs/tokenizers/python-reference.txt"
BYTES = load_tokenizer("bytes")
PIECES = CpmTokenizer([*SPECIAL_TOKENS, "a", "ab", "abcd", " the", "<用户>", "<A"])
TOKENIZERS = {"bytes": BYTES, "pieces": PIECES, "shipped": load_tokenizer(str(SHIPPED))}


@given(st.sampled_from(sorted(TOKENIZERS)), st.text() | st.text(alphabet="abcd<s>用户 the0x/A"))
def test_any_text_survives_the_round_trip(name, text):
    tokenizer = TOKENIZERS[name]

    ids = tokenizer.encode(text)

    assert tokenizer.decode(ids) == text
    assert all(0 <= number < tokenizer.size for number in ids)


def longest_match(tokens: list[str], text: str) -> list[int]:
    """Say what greedy longest match with byte fallback is, as plainly as possible."""
    pieces = [token for token in tokens if token and token not in SPECIAL_TOKENS]
    ids = []
    while text:
        fitting = [piece for piece in pieces if text.startswith(piece)]
        longest = max(fitting, key=len, default="")
        if longest:
            ids.append(tokens.index(longest))
        else:
            ids.extend(tokens.index(f"<0x{byte:02X}>") for byte in text[0].encode())
        text = text[len(longest) or 1 :]
    return ids


@given(st.lists(st.text("ab用 <", max_size=5), max_size=12, unique=True), st.text("abc用 <s>", max_size=40))
def test_text_is_cut_as_the_plain_definition_says(pieces, text):
    tokens = [*SPECIAL_TOKENS, *pieces]

    assert CpmTokenizer(tokens).encode(text) == longest_match(tokens, text)


def test_time_grows_with_the_length_of_a_text_and_not_with_its_square():
    text = "the cat sat on 训练 " * 20_000

    started = time.monotonic()
    ids = TOKENIZERS["shipped"].encode(text)

    assert time.monotonic() - started < 10
    assert TOKENIZERS["shipped"].decode(ids) == text


def test_texts_encoded_together_are_those_encoded_alone():
    texts = ["abcd", "", " the"]

    assert PIECES.encode_many(texts) == [PIECES.encode(text) for text in texts]


def test_special_tokens_have_cpms_ids():
    assert (BYTES.bos, BYTES.eos, BYTES.size) == (1, 2, 259)
    assert BYTES.encode("\0A\n") == [3, 3 + 65, 3 + 10]
    assert SPECIAL_TOKENS[3 + 10] == "<0x0A>"


def test_the_longest_piece_wins():
    first = len(SPECIAL_TOKENS)

    assert PIECES.encode("abcd") == [first + 2]
    assert PIECES.encode("abc") == [first + 1, 3 + ord("c")]


def test_text_cannot_smuggle_special_tokens():
    assert PIECES.eos not in PIECES.encode("</s><s><0x41>")


def test_special_tokens_are_silent_and_broken_bytes_show():
    assert BYTES.decode([1, 3 + 65, 2, 0]) == "A"
    assert BYTES.decode([3 + 0xE7, 3 + 65, 999]) == "\N{REPLACEMENT CHARACTER}A\N{REPLACEMENT CHARACTER}"


def test_an_unpaired_surrogate_does_not_stop_training():
    assert BYTES.decode(BYTES.encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["<unk>", "<s>"], "lacks </s>, <0x00>, <0x01>"),
        ([*SPECIAL_TOKENS, "a", "a"], "lists a token twice"),
        ([*SPECIAL_TOKENS, 7], ":260: expected one JSON string, got 7"),
    ],
)
def test_a_broken_vocabulary_is_refused(tmp_path, lines, says):
    path = tmp_path / "vocab.txt"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    with pytest.raises(UserError, match="vocab.txt") as caught:
        load_tokenizer(str(path))

    assert says in str(caught.value)


def test_a_missing_vocabulary_is_refused():
    with pytest.raises(UserError, match="cannot read the vocabulary /absent.txt"):
        load_tokenizer("/absent.txt")


def test_a_built_vocabulary_prefers_frequent_pieces_and_has_the_size_asked_for():
    texts = ["the cat and the dog and the bird"] * 3

    tokens = build_vocabulary(texts, 280)

    assert len(tokens) == 280 and tokens[: len(SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)
    assert "<用户>" in tokens and " the" in tokens
    assert build_vocabulary(texts, 280) == tokens
    assert len(CpmTokenizer(build_vocabulary(texts, 600)).encode(texts[0])) < 12


def test_a_vocabulary_too_small_for_the_special_tokens_is_refused():
    with pytest.raises(UserError, match="at least 261 entries, not 100"):
        build_vocabulary(["text"], 100)


def test_chinese_text_gets_pieces_of_its_own():
    tokens = build_vocabulary(["训练大模型，训练小模型。"] * 5, 300)

    assert {"训", "模型", "训练"} <= set(tokens)


def test_the_program_writes_a_vocabulary_that_the_trainer_reads(tmp_path):
    data, output = tmp_path / "data.jsonl", tmp_path / "vocab.txt"
    data.write_text(json.dumps({"input": "who?", "output": "the cat, the cat, the cat"}) + "\n")
    program = [sys.executable, "-m", "cpm_cluster.training.build_vocabulary"]

    subprocess.run([*program, str(output), str(data), "--size", "270"], check=True, timeout=30)
    refused = subprocess.run(
        [*program, str(output), str(tmp_path / "absent")], capture_output=True, timeout=30, check=False
    )

    assert load_tokenizer(str(output)).size == 270
    assert refused.returncode == 2 and b"cannot be read" in refused.stderr


def test_the_shipped_vocabulary_suits_its_corpus():
    text = "".join(row.output for row in read_rows([PYTHON_REFERENCE], "eval"))
    tokenizer = TOKENIZERS["shipped"]

    assert tokenizer.size == 2048
    assert len(text) / len(tokenizer.encode(text)) > 3
