"""Tokenizers of Hugging Face, made here: byte-level BPE, which knows every text."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_cluster.training.data.tokenizer import load_tokenizer
from cpm_cluster.training.errors import UserError

tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["the cat sat on the mat", "训练大模型", "a < b and </s> ends"] * 3


def write_tokenizer(path, special=("<s>", "</s>", "<pad>")) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <pad>" if "<pad>" in special else "$A", special_tokens=[("<pad>", 2)] if "<pad>" in special else []
    )
    made.enable_truncation(4)
    path.parent.mkdir(exist_ok=True)
    made.save(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a tokenizer and no description of its special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder / "tokenizer.json")
    return folder


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=50) | st.text(alphabet="the cat</s><pad>训练", max_size=50))
def test_any_text_survives_the_round_trip(folder, text):
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))

    ids = tokenizer.encode(text)

    assert tokenizer.decode(ids) == text
    assert all(3 <= number < tokenizer.size for number in ids), "no special token comes out of a text, or is added"


def test_a_folder_stands_for_the_tokenizer_in_it(folder):
    by_folder, by_file = load_tokenizer(str(folder)), load_tokenizer(str(folder / "tokenizer.json"))

    assert by_folder.encode_many(TEXTS) == [by_file.encode(text) for text in TEXTS]
    assert by_folder.identity == by_file.identity
    assert (by_folder.bos, by_folder.eos, by_folder.size) == (0, 1, 294)


def test_the_description_beside_it_names_the_special_tokens(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json", special=("<end>", "<begin>"))
    config = tmp_path / "tokenizer_config.json"

    config.write_text(json.dumps({"bos_token": "<begin>", "eos_token": {"content": "<end>", "lstrip": False}}))
    tokenizer = load_tokenizer(str(tmp_path))
    config.write_text(json.dumps({"bos_token": None, "eos_token": "<end>"}))
    without_bos = load_tokenizer(str(tmp_path))

    assert (tokenizer.bos, tokenizer.eos) == (1, 0)
    assert (without_bos.bos, without_bos.eos) == (0, 0)
    assert tokenizer.identity != without_bos.identity


def test_a_tokenizer_that_cannot_end_a_document_is_refused(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json", special=("<odd>",))

    with pytest.raises(UserError, match="which token ends a document.*eos_token in .*tokenizer_config.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "there is no file .*tokenizer.json"),
        ({"tokenizer.json": "{}"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer.json": "nonsense"}, "tokenizer.json is not a tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    with pytest.raises(UserError, match=says):
        load_tokenizer(str(tmp_path))


def test_a_broken_description_is_refused(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")

    with pytest.raises(UserError, match="tokenizer_config.json is not JSON"):
        load_tokenizer(str(tmp_path))


def test_an_unpaired_surrogate_does_not_stop_training(folder):
    tokenizer = load_tokenizer(str(folder))

    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_without_the_package_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)

    with pytest.raises(UserError, match="needs the package tokenizers: pip install tokenizers"):
        load_tokenizer(str(folder))
