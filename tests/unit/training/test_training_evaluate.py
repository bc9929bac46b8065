"""The program evaluate: perplexity by source, and multiple choice."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_runs import ROWS, encode_row, initialise, paired, source
from torch.nn import functional

from cpm_cluster.training.data.corpus import Row
from cpm_cluster.training.data.tokenizer import load_tokenizer
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.inference.multiple_choice import ChoiceFile, Question, read_choice_files
from cpm_cluster.training.model.decoder import CPM
from cpm_cluster.training.settings_file import parse_settings

pytestmark = pytest.mark.timeout(90)

BYTES = load_tokenizer("bytes")
QUESTIONS = [
    {"question": f"{letter}?", "choices": [letter, letter * 3, "no"], "answer": number % 3}
    for number, letter in enumerate("abcdefg")
]


@pytest.fixture
def evaluate_run(tiny_run, tmp_path):
    """Make runs of task evaluate on random weights; they are the run's ``model``."""
    weights = tmp_path / "weights.pt"
    long, choices = tmp_path / "long.jsonl", tmp_path / "choices.jsonl"
    long.write_text(json.dumps({"input": "", "output": "words without end " * 8}) + "\n")
    choices.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))

    def make(name: str, **changes):
        run = tiny_run(name, **{"task": "evaluate", "init_from": str(weights), **changes})
        run.change("data.eval", [*run.raw["data"]["eval"], source(long)])
        run.change("evaluation", {"choices": [str(choices)], "shots": 1})
        torch.manual_seed(0)
        run.model = CPM(parse_settings(run.raw).model)
        initialise(run.model)
        torch.save(run.model.state_dict(), weights)
        return run

    return make


def loss_of(model, ids: list[int], loss_from: int) -> float:
    """The summed loss of one document, computed by itself."""
    row = torch.tensor([ids[:-1]])
    with torch.no_grad():
        logits = model(row, torch.zeros_like(row), torch.arange(row.shape[1])[None])[0]
    return float(functional.cross_entropy(logits[loss_from - 1 :], torch.tensor(ids[loss_from:]), reduction="sum"))


def test_the_results_are_those_of_documents_by_themselves_on_any_ranks(evaluate_run):
    ranks, sharded = evaluate_run("ranks"), evaluate_run("sharded", **{"training.zero_stage": 3})

    assert ranks.train() == [0, 0], ranks.log()
    assert sharded.train() == [0, 0], sharded.log()

    results = ranks.json("evaluation.json")
    first, second, together = results["perplexity"]
    documents = [encode_row(Row(row["input"], row["output"]), BYTES) for row in ROWS]
    expected = sum(loss_of(ranks.model, sample.ids.tolist(), sample.loss_from) for sample in documents)
    targets = sum(len(sample.ids) - sample.loss_from for sample in documents)
    assert first["loss"] == pytest.approx(expected / targets, rel=1e-5) and first["tokens"] == targets
    assert first["perplexity"] == pytest.approx(math.exp(first["loss"]))
    assert second["tokens"] == 8 * len("words without end ") + 1  # longer than a row: split, not dropped
    assert together["source"] == "all" and together["tokens"] == targets + second["tokens"]
    assert together["loss"] * together["tokens"] == pytest.approx(
        first["loss"] * targets + second["loss"] * second["tokens"]
    )

    (choices,) = results["choices"]
    file = ChoiceFile("", 1, ranks.raw["seed"], [as_question(question) for question in QUESTIONS], BYTES)
    alone = file.score([-loss_of(ranks.model, sample.ids.tolist(), sample.loss_from) for sample in file.samples])
    assert choices == {**alone._asdict(), "file": choices["file"]}

    other = sharded.json("evaluation.json")
    assert [row["loss"] for row in other["perplexity"]] == pytest.approx([row["loss"] for row in results["perplexity"]])
    assert other["choices"] == results["choices"]
    assert ranks.json("outcome.json")["outcome"] == "finished"
    table = ranks.log()
    assert "perplexity over" in table and f"{together['perplexity']:.3f}" in table
    assert "multiple choice" in table and f"{choices['accuracy']:.4f} ± {choices['standard_error']:.4f}" in table


def test_a_request_to_stop_is_heard_between_batches(evaluate_run):
    run = evaluate_run("run")
    run.ask_to_stop()

    assert run.train() == [85, 85]

    assert run.json("outcome.json")["outcome"] == "stopped"
    assert not (run.directory / "evaluation.json").exists()


def as_question(raw: dict) -> Question:
    """A question as it stands in a file."""
    return Question(raw["question"], tuple(raw["choices"]), raw["answer"])


class TestChoices:
    def test_the_likeliest_choice_is_the_answer_and_by_length_the_likeliest_per_character(self):
        questions = [Question("q", ("ab", "abcdefgh"), 0), Question("r", ("ab", "abcdefgh"), 1)]

        score = ChoiceFile("file", 0, 1, questions, BYTES).score([-2.0, -4.0, -2.0, -4.0])

        assert (score.accuracy, score.accuracy_normalised, score.questions) == (0.5, 0.5, 2)
        assert score.standard_error == pytest.approx(math.sqrt(0.25 / 2))
        assert ChoiceFile("file", 0, 1, questions[:1], BYTES).score([-2.0, -4.0]).accuracy == 1.0
        assert ChoiceFile("file", 0, 1, questions[:1], BYTES).score([-2.0, -4.0]).accuracy_normalised == 0.0

    def test_the_loss_is_on_the_choice_after_examples_and_question(self):
        questions = [Question("who?", ("the dog", "a cat"), 1), Question("what?", ("it", "that"), 0)]

        sample = ChoiceFile("file", 1, 1, questions, BYTES).samples[1]

        assert BYTES.decode(sample.ids.tolist()) == "<用户>what?<AI>it\n<用户>who?<AI>a cat"
        assert BYTES.decode(sample.ids[sample.loss_from :].tolist()) == "a cat"
        assert sample.ids[0] == BYTES.bos and BYTES.eos not in sample.ids

    def test_examples_are_others_of_the_file_and_the_same_for_the_same_seed(self):
        questions = [as_question(question) for question in QUESTIONS] + [as_question(QUESTIONS[0])]

        def shown(seed: int) -> list[str]:
            samples = ChoiceFile("file", 3, seed, questions, BYTES).samples[::3]
            return [BYTES.decode(sample.ids[: sample.loss_from].tolist()) for sample in samples]

        assert shown(1) == shown(1) != shown(2)
        for question, text in paired(questions, shown(1)):
            assert text.count(f"<用户>{question.question}<AI>") == 1 and text.count("<AI>") == 4

    def test_all_broken_rows_are_listed_with_their_places(self, tmp_path):
        good = {"question": "q", "choices": ["a", "b"], "answer": 1}
        wrong = [
            ({"answer": None}, '"answer" is not the number of a choice, 0 to 1'),
            ({"answer": 2}, '"answer" is not the number of a choice, 0 to 1'),
            ({"answer": True}, '"answer" is not the number of a choice'),
            ({"choices": ["a"]}, '"choices" is not a list of two texts or more'),
            ({"choices": ["a", 3]}, '"choices" is not a list of two texts or more'),
            ({"choices": ["a", ""]}, '"choices" has an empty text'),
            ({"question": ""}, '"question" is empty'),
            ({"question": 1}, '"question" is not a text'),
        ]
        one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
        one.write_text("".join(json.dumps({**good, **change}) + "\n" for change, _ in wrong))
        two.write_text(json.dumps(good) + "\n" + json.dumps({"question": "q"}) + "\n")

        with pytest.raises(UserError) as caught:
            read_choice_files([str(tmp_path / "*.jsonl"), str(tmp_path / "none.jsonl")], 0, 1, BYTES, 48)

        message = str(caught.value)
        assert "the data have 10 problem(s)" in message
        for line, (_, what) in enumerate(wrong, 1):
            assert f"{one}:{line}: {what}" in message
        assert f'{two}:2: has no "choices"' in message and "none.jsonl: cannot be read" in message

    def test_questions_that_do_not_fit_and_examples_that_are_missing_are_listed(self, tmp_path):
        path = tmp_path / "choices.jsonl"
        rows = [{"question": "q" * length, "choices": ["a", "b"], "answer": 1} for length in (3, 60)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

        with pytest.raises(UserError) as caught:
            read_choice_files([str(path)], 2, 1, BYTES, 48)

        message = str(caught.value)
        assert f"{path}:2: question, examples and a choice have" in message and "training.seq_len is 48" in message
        assert f"{path}:1: there are 1 other questions for 2 examples (evaluation.shots)" in message
