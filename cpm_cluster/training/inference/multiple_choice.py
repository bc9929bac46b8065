"""Multiple-choice questions: what the model is shown, and how its answers are counted.

A question is wrapped as in fine-tuning, PROMPT, after ``shots`` others of its file with their answers, each on lines of
its own. The model's answer is the choice to whose tokens it gives the highest probability; normalised by length, the
one with the highest log-probability per character (Gao et al., lm-evaluation-harness, ``acc`` and ``acc_norm``).
"""

from __future__ import annotations

import math
import random
from typing import Iterator, NamedTuple, Sequence

import numpy as np

from cpm_cluster.training.data.jsonl import Parsed, Place, read_objects, require_none
from cpm_cluster.training.data.packing import PROMPT, Sample
from cpm_cluster.training.data.tokenizer import Tokenizer


class Question(NamedTuple):
    """A question, two choices or more, and the number of the right one, from 0."""

    question: str
    choices: tuple[str, ...]
    answer: int


class Score(NamedTuple):
    """How a file's questions were answered; ``standard_error`` is that of ``accuracy``."""

    file: str
    questions: int
    shots: int
    accuracy: float
    accuracy_normalised: float
    standard_error: float


class ChoiceFile:
    """A file of questions as samples whose loss is on a choice: question after question, choice after choice."""

    def __init__(self, file: str, shots: int, seed: int, questions: Sequence[Question], tokenizer: Tokenizer) -> None:
        """Draw the examples and encode; equal seeds draw equal ones."""
        self.file, self.shots, self.questions = file, shots, questions
        self.samples = [sample for number in range(len(questions)) for sample in self._samples(number, seed, tokenizer)]

    def score(self, log_likelihoods: Sequence[float]) -> Score:
        """Count right answers; ``log_likelihoods`` are those of the samples. The first of equal choices counts."""
        right = normalised = 0
        values = iter(log_likelihoods)
        for question in self.questions:
            sums = [next(values) for _ in question.choices]
            means = [value / len(choice) for value, choice in zip(sums, question.choices)]
            right += sums.index(max(sums)) == question.answer
            normalised += means.index(max(means)) == question.answer
        count = len(self.questions)
        share = right / count
        error = math.sqrt(share * (1 - share) / count)
        return Score(self.file, count, self.shots, share, normalised / count, error)

    def others(self, number: int) -> list[Question]:
        """Return the questions that may be examples for one: those that ask something else."""
        asked = self.questions[number].question
        return [other for other in self.questions if other.question != asked]

    def _samples(self, number: int, seed: int, tokenizer: Tokenizer) -> list[Sample]:
        others = self.others(number) if self.shots else []
        drawn = random.Random(f"{seed}-{number}").sample(others, min(self.shots, len(others)))
        shown = [PROMPT.format(other.question) + other.choices[other.answer] + "\n" for other in drawn]
        question = self.questions[number]
        context = tokenizer.encode("".join(shown) + PROMPT.format(question.question))
        return [
            Sample(np.array([tokenizer.bos, *context, *choice], dtype=np.int64), 1 + len(context))
            for choice in tokenizer.encode_many(question.choices)
        ]


def read_choice_files(
    sources: Sequence[str], shots: int, seed: int, tokenizer: Tokenizer, seq_len: int
) -> list[ChoiceFile]:
    """Read files, or patterns of files, of questions.

    Raises UserError listing every line that is broken, too long, or lacks ``shots`` other questions as examples.
    """
    found = read_objects(sources, parse_question)
    places: dict[str, list[Place]] = {}
    questions: dict[str, list[Question]] = {}
    for place, question in found:
        places.setdefault(place.file, []).append(place)
        questions.setdefault(place.file, []).append(question)
    files = [ChoiceFile(file, shots, seed, questions[file], tokenizer) for file in questions]
    require_none([problem for file in files for problem in _problems(file, places[file.file], seq_len)])
    return files


def parse_question(value: dict[str, object]) -> Parsed[Question]:
    """Return the question in a JSON object, or what is wrong with it."""
    missing = [key for key in ("question", "choices", "answer") if key not in value]
    if missing:
        return f'has no "{missing[0]}"'
    question, choices, answer = value["question"], value["choices"], value["answer"]
    if not isinstance(question, str) or not question:
        return '"question" is not a text' if not isinstance(question, str) else '"question" is empty'
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        return '"choices" is not a list of two texts or more'
    if not all(choices):
        return '"choices" has an empty text'
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f'"answer" is not the number of a choice, 0 to {len(choices) - 1}'
    return Question(question, tuple(choices), answer)


def _problems(file: ChoiceFile, places: Sequence[Place], seq_len: int) -> Iterator[str]:
    samples = iter(file.samples)
    for number, (place, question) in enumerate(zip(places, file.questions)):
        longest = max(len(next(samples).ids) - 1 for _ in question.choices)
        if longest > seq_len:
            yield f"{place}: question, examples and a choice have {longest} tokens, and training.seq_len is {seq_len}"
        examples = len(file.others(number)) if file.shots else 0
        if examples < file.shots:
            yield f"{place}: there are {examples} other questions for {file.shots} examples (evaluation.shots)"
