"""The program generate: an answer for every prompt, in their order, and none twice."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from tiny_runs import initialise

from cpm_cluster.training.data.tokenizer import load_tokenizer
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.inference.generation import Answer, Answers, Prompt, read_prompts
from cpm_cluster.training.model.decoder import CPM
from cpm_cluster.training.settings_file import parse_settings

pytestmark = pytest.mark.timeout(90)

BYTES = load_tokenizer("bytes")
PROMPTS = ["who?", "", "a longer question than the others", "x", "who?"]


@pytest.fixture
def generate_run(tiny_run, tmp_path):
    """Make runs of task generate on random weights that are large enough to say something."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": text, "id": number}) + "\n" for number, text in enumerate(PROMPTS)))

    def make(name: str, **changes):
        generation = {"prompts": str(prompts), "batch": 2, "max_tokens": 9, "temperature": 1.0, "top_p": 0.9}
        weights = tmp_path / "weights.pt"
        run = tiny_run(
            name,
            **{"task": "generate", "init_from": str(weights), "generation": generation, "data.train": [], **changes},
        )
        run.change("training.seq_len", 64)
        if not weights.exists():
            torch.manual_seed(0)
            model = CPM(parse_settings(run.raw).model)
            initialise(model)
            torch.save({key: 3 * weight for key, weight in model.state_dict().items()}, weights)
        return run

    return make


def test_answers_do_not_depend_on_ranks_batches_or_sharding(generate_run):
    alone = generate_run("alone", expected_world_size=1)
    ranks = generate_run("ranks", **{"generation.batch": 1})
    sharded = generate_run("sharded", **{"training.zero_stage": 3})

    assert alone.train(world_size=1) == [0]
    assert ranks.train() == [0, 0]
    assert sharded.train() == [0, 0], sharded.log()

    answers = alone.lines("generated.jsonl")
    assert [answer["input"] for answer in answers] == PROMPTS
    assert answers == ranks.lines("generated.jsonl") == sharded.lines("generated.jsonl")
    assert answers[0]["output"] != answers[4]["output"]  # the seed is that of the prompt's place
    assert all(set(answer) == {"input", "output", "finish", "tokens"} for answer in answers)
    assert all((answer["finish"] == "length") == (answer["tokens"] == 9) for answer in answers)
    assert sharded.json("outcome.json")["outcome"] == "finished"
    progress = sharded.json("progress.json")
    assert (progress["phase"], progress["step"], progress["steps"]) == ("done", 5, 5)
    assert alone.log().splitlines()[-1] == "finished after 5 of 5 prompts"


def test_what_an_earlier_attempt_answered_is_kept_and_the_rest_is_done(generate_run):
    run = generate_run("run")
    run.ask_to_stop()
    assert run.train(torchrun=True) == [0, 0]
    assert run.json("outcome.json")["outcome"] == "stopped"
    assert not (run.directory / "generated.jsonl").exists()
    earlier = {"number": 3, "input": "x", "output": "answered before", "finish": "stop", "tokens": 2}
    torn = json.dumps({**earlier, "number": 1})[:40]
    (run.directory / "generated/rank-7.jsonl").write_text(json.dumps(earlier) + "\n" + torn)

    run.withdraw_stop()
    assert run.train(world_size=1, expected_world_size=1) == [0]

    answers = run.lines("generated.jsonl")
    assert [answer["input"] for answer in answers] == PROMPTS
    assert [answer["output"] == "answered before" for answer in answers] == [False, False, False, True, False]

    assert run.train(world_size=1, seed=8) == [2]
    assert "holds answers to other prompts, or of another model" in run.json("errors/rank-0.json")["message"]


def test_answers_of_another_node_are_waited_for(generate_run):
    settings = parse_settings(generate_run("nodes").raw)
    first, second = (Answers(settings, settings.generation, rank) for rank in range(2))
    first.gather_earlier()
    prompts = [Prompt(number, PROMPTS[number], [1]) for number in range(2)]
    first.add([Answer(0, PROMPTS[0], "me", "stop", 1)])
    late = threading.Timer(0.3, second.add, ([Answer(1, "", "you", "stop", 1)],))

    late.start()
    first.publish(prompts)

    lines = (Path(settings.output_dir) / "generated.jsonl").read_text().splitlines()
    assert [json.loads(line)["output"] for line in lines] == ["me", "you"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "bmtrain"}, "task generate runs on engine torch, not on bmtrain; write engine: torch"),
        ({"init_from": None}, "init_from: task generate needs trained weights"),
        (
            {"method": {"kind": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["project_q"]}},
            "method.lora.init_from: task generate needs the trained updates; or write method: full",
        ),
    ],
)
def test_what_it_cannot_do_is_said_in_a_sentence(generate_run, changes, message):
    run = generate_run("run", expected_world_size=1, **changes)

    assert run.train(world_size=1) == [2]

    assert message in run.json("errors/rank-0.json")["message"]


def test_the_task_must_be_the_programs(generate_run, capsys, monkeypatch):
    from cpm_cluster.training.finetune import main

    monkeypatch.delenv("RANK", raising=False)

    assert main([generate_run("run").write_settings()]) == 2
    assert "task is generate: start the program cpm_cluster.training.generate" in capsys.readouterr().err


def test_all_broken_prompts_are_listed_with_their_places(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"input": "x"}\n{"question": "x"}\n\n{"input": 3}\n[1]\n{"input": "\xff"}\n{"input"')

    with pytest.raises(UserError) as caught:
        read_prompts(str(path), BYTES, 48)

    message = str(caught.value)
    assert "the data have 6 problem(s)" in message
    assert f'{path}:2: has no "input"' in message and f"{path}:3: is not JSON: the line is blank" in message
    assert f'{path}:4: "input" is not a text' in message and f"{path}:5: is not an object" in message
    assert f"{path}:6: is not UTF-8 from byte 12 on" in message and f"{path}:7: is not JSON" in message


def test_prompts_without_room_for_an_answer_are_listed(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"input": "x" * length}) + "\n" for length in (30, 3, 40)))

    with pytest.raises(UserError) as caught:
        read_prompts(str(path), BYTES, 30)

    assert str(caught.value).count("tokens, and training.seq_len is 30") == 2
    assert f"{path}:1: the prompt has 43 tokens" in str(caught.value)
    assert len(read_prompts(str(path), BYTES, 53)) == 3


def test_a_file_that_is_missing_or_empty_is_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")

    with pytest.raises(UserError, match="nowhere.jsonl: cannot be read: No such file"):
        read_prompts(str(tmp_path / "nowhere.jsonl"), BYTES, 48)
    with pytest.raises(UserError, match="empty.jsonl: is empty"):
        read_prompts(str(tmp_path / "empty.jsonl"), BYTES, 48)
