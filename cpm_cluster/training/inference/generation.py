"""Task generate: every prompt of a jsonl file is continued; no answer is computed twice.

Each rank appends its answers to ``generated/rank-R.jsonl``, a batch at a time. The next attempt, of any number of
ranks, gathers them in ``generated/earlier.jsonl`` and does the rest. When all are there, they become
``generated.jsonl``: a line for each prompt, in the order of the prompts.
"""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from cpm_cluster.training.attempt import open_tokenizer
from cpm_cluster.training.data.jsonl import Parsed, read_objects, require_none
from cpm_cluster.training.data.packing import PROMPT
from cpm_cluster.training.data.tokenizer import Tokenizer
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import sha256_of, write_json, write_text
from cpm_cluster.training.inference.decoding import continue_together
from cpm_cluster.training.inference.loaded import Advance, Inference, run_inference
from cpm_cluster.training.inference.sampling import draw
from cpm_cluster.training.placement import Placement
from cpm_cluster.training.settings import GenerationSettings, Settings
from cpm_cluster.training.stop import StopRequest

# NFS keeps what it knows of a folder for up to a minute (acdirmax, nfs(5)).
_SECONDS_TO_APPEAR, _SECONDS_BETWEEN_LOOKS = 90.0, 0.5


class Prompt(NamedTuple):
    """A line of the prompts' file, from 0; ``ids`` begin with ``<s>``."""

    number: int
    input: str
    ids: list[int]


class Answer(NamedTuple):
    """What the model wrote; ``finish`` is "stop" where it ended by itself, "length" where its tokens were used up."""

    number: int
    input: str
    output: str
    finish: str
    tokens: int


def generate(settings: Settings, placement: Placement, settings_text: bytes) -> str:
    """Continue the prompts that have no answer yet, on this rank; return "finished" or "stopped"."""
    return run_inference(settings, placement, settings_text, "generating", "prompts", _generate)


def _generate(settings: Settings, inference: Inference, stop: StopRequest, advance: Advance) -> str:
    if settings.generation is None:
        raise UserError("generation: task generate needs prompts")
    tokenizer = open_tokenizer(settings)
    prompts = read_prompts(settings.generation.prompts, tokenizer, settings.training.seq_len)
    answers = Answers(settings, settings.generation, inference.rank)
    answered = answers.gather_earlier() if inference.rank == 0 else set()
    known = inference.from_rank_0([prompt.number in answered for prompt in prompts])
    inference.build()
    writer = Writer(settings, settings.generation, inference, tokenizer)
    todo = [prompt for prompt, is_known in zip(prompts, known) if not is_known]
    done, at_once = len(prompts) - len(todo), settings.generation.batch * inference.world_size
    advance.begin(done, len(prompts))
    for start in range(0, len(todo), at_once):
        if inference.any_rank(stop.pending):
            return "stopped"
        began = time.monotonic()
        round_ = todo[start : start + at_once]
        drawn = answers.add(writer.answer(round_[inference.rank :: inference.world_size]))
        # Also the end of a round: what is counted as done is on disk.
        tokens = float(inference.summed(torch.tensor([drawn]))[0])
        seconds = time.monotonic() - began
        done += len(round_)
        eta = (len(prompts) - done) * seconds / len(round_)
        advance.note(done, tokens_per_second=tokens / seconds, eta_seconds=eta)
    if inference.rank == 0:
        answers.publish(prompts)
    return "finished"


def read_prompts(source: str, tokenizer: Tokenizer, seq_len: int) -> list[Prompt]:
    """Return the prompts, wrapped as in fine-tuning; an empty one is ``<s>`` alone.

    Raises UserError listing all lines that are broken, or leave no room for an answer in ``seq_len`` tokens.
    """
    inputs = [(place, text) for place, (text,) in read_objects([source], _parse_prompt)]
    encoded = iter(tokenizer.encode_many([PROMPT.format(text) for _, text in inputs if text]))
    prompts = [
        Prompt(number, text, [tokenizer.bos, *(next(encoded) if text else [])])
        for number, (_, text) in enumerate(inputs)
    ]
    require_none(
        [
            f"{place}: the prompt has {len(prompt.ids)} tokens, and training.seq_len is {seq_len}"
            for (place, _), prompt in zip(inputs, prompts)
            if len(prompt.ids) > seq_len
        ]
    )
    return prompts


def _parse_prompt(value: dict[str, object]) -> Parsed[tuple[str]]:
    if "input" not in value:
        return 'has no "input"'
    text = value["input"]
    return (text,) if isinstance(text, str) else '"input" is not a text'


class Writer:
    """Continues prompts: what is drawn for one depends on the seed and its number, not on its companions.

    That holds but for rounding: a product of matrices of another size may differ in its last bit.
    """

    def __init__(
        self, settings: Settings, generation: GenerationSettings, inference: Inference, tokenizer: Tokenizer
    ) -> None:
        self._seed, self._seq_len, self._generation = settings.seed, settings.training.seq_len, generation
        self._inference, self._tokenizer = inference, tokenizer

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Continue some prompts together. Collective where the model is sharded."""
        generation, inference = self._generation, self._inference
        numbers = [random.Random(f"{self._seed}-{prompt.number}") for prompt in prompts]

        def choose(logits: Tensor) -> list[int]:
            return draw(logits, generation.temperature, generation.top_p, [each.random() for each in numbers])

        continued = continue_together(
            [prompt.ids for prompt in prompts],
            [min(generation.max_tokens, self._seq_len + 1 - len(prompt.ids)) for prompt in prompts],
            self._tokenizer.eos,
            inference.device,
            inference.continue_cache,
            choose,
            inference.any_rank if inference.sharded else bool,
        )
        return [
            Answer(prompt.number, prompt.input, self._tokenizer.decode(ids), "stop" if ended else "length", len(ids))
            for prompt, (ids, ended) in zip(prompts, continued)
        ]


class Answers:
    """The answers of all attempts on disk."""

    def __init__(self, settings: Settings, generation: GenerationSettings, rank: int) -> None:
        """Raise UserError when earlier answers were made in another way."""
        output_dir = Path(settings.output_dir)
        self._all = output_dir / "generated.jsonl"
        self._folder = output_dir / "generated"
        self._earlier = self._folder / "earlier.jsonl"
        self._own = self._folder / f"rank-{rank}.jsonl"
        self._way_file = self._folder / "settings.json"
        self._way: dict[str, object] = {
            "model": asdict(settings.model),
            "init_from": settings.init_from,
            "adapter": settings.adapter,
            "tokenizer": settings.tokenizer,
            "seed": settings.seed,
            # How many at a time makes no difference.
            "generation": {**asdict(generation), "batch": None},
            "prompts_sha256": sha256_of(Path(generation.prompts)),
        }
        if self._way_file.exists() and json.loads(self._way_file.read_text(encoding="utf-8")) != self._way:
            raise UserError(
                f"{self._folder} holds answers to other prompts, or of another model or generation;"
                " use a new output_dir, or remove it"
            )

    def gather_earlier(self) -> set[int]:
        """Bring together what earlier attempts left, and return the numbers of those prompts. Rank 0 alone."""
        answers = self._read()
        write_text(self._earlier, "".join(_line(answer._asdict()) for answer in answers.values()))
        for path in self._parts():
            path.unlink()
        write_json(self._way_file, self._way)
        return set(answers)

    def add(self, answers: Sequence[Answer]) -> int:
        """Append answers, synced; return how many tokens they have."""
        with open(self._own, "a", encoding="utf-8") as file:
            file.writelines(_line(answer._asdict()) for answer in answers)
            file.flush()
            os.fsync(file.fileno())
        return sum(answer.tokens for answer in answers)

    def publish(self, prompts: Sequence[Prompt]) -> None:
        """Write ``generated.jsonl``. Rank 0 alone, when all ranks have added theirs.

        Raises OSError when answers of other nodes do not become visible here.
        """
        deadline = time.monotonic() + _SECONDS_TO_APPEAR
        answers = self._read()
        while missing := [prompt.number for prompt in prompts if prompt.number not in answers]:
            if time.monotonic() > deadline:
                raise OSError(
                    f"{self._folder} lacks {len(missing)} answers that other ranks have written: is it shared?"
                )
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            answers = self._read()
        lines = [answers[prompt.number]._asdict() for prompt in prompts]
        write_text(self._all, "".join(_line({k: v for k, v in line.items() if k != "number"}) for line in lines))

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("rank-*.jsonl"))

    def _read(self) -> dict[int, Answer]:
        """Return the answers by number; a last line that was torn is left out."""
        answers = {}
        for path in [self._earlier, *self._parts()]:
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
                try:
                    answer = Answer(**json.loads(line))
                except (ValueError, TypeError):
                    continue
                answers[answer.number] = answer
        return answers


def _line(record: dict[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
