"""Batches: the same data in the same order for any number of ranks and any number of attempts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_runs import TINY, changed, paired, source

from cpm_cluster.training.data.batches import TrainingData, evaluation_sources, short_names
from cpm_cluster.training.data.packing import IGNORED
from cpm_cluster.training.data.token_index import Ranks
from cpm_cluster.training.data.tokenizer import load_tokenizer
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.placement import Placement
from cpm_cluster.training.settings_file import parse_settings

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the settings of a run of two weighted sources, one of 40 and one of 15 samples."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("many", 40), ("few", 15)):
        rows = [{"input": "", "output": f"{name} {number} " + "." * (number % 7)} for number in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [source(folder / "many.jsonl", 1.0), source(folder / "few.jsonl", 2.0)]

    unweighted = [source(item["path"]) for item in sources]

    def settings(**changes):
        base = {"output_dir": str(folder / "run"), "data.train": sources, "data.eval": unweighted}
        return parse_settings(changed(TINY, {**base, **changes}))

    return settings


def opened(settings, rank: int = 0, world_size: int = 1, said=None) -> TrainingData:
    placement = Placement(rank, world_size, rank)
    say = (lambda line: None) if said is None else said.append
    return TrainingData(settings, BYTES, on(placement), say)


def on(placement: Placement) -> Ranks:
    return Ranks(placement, lambda value: [value], lambda done, total: None, lambda: False)


def rows_of(batches) -> list[str]:
    return [BYTES.decode(row.tolist()) for batch in batches for row in batch.input_ids]


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(1, 4))
def test_a_resumed_run_goes_on_with_the_next_row(run, before, after):
    straight = opened(run())
    for _ in range(before):
        straight.next_batches()

    resumed = opened(run())
    resumed.seek(json.loads(json.dumps(straight.position)))

    for _ in range(after):
        assert rows_of(resumed.next_batches()) == rows_of(straight.next_batches())
    assert resumed.position == straight.position


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_has_the_same_rows_on_any_number_of_ranks(run, world_size):
    alone = opened(run(**{"training.grad_accum": 4}))
    ranks = [opened(run(**{"training.grad_accum": 4 // world_size}), rank, world_size) for rank in range(world_size)]

    for _ in range(12):
        rows = [row for rank in ranks for row in rows_of(rank.next_batches())]
        assert sorted(rows) == sorted(rows_of(alone.next_batches()))
        assert {json.dumps(rank.position) for rank in ranks} == {json.dumps(alone.position)}


def test_a_run_can_go_on_with_another_number_of_ranks(run):
    alone = opened(run(**{"training.grad_accum": 2}))
    alone.next_batches()
    ranks = [opened(run(), rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.seek(alone.position)

    rows = [row for rank in ranks for row in rows_of(rank.next_batches())]

    assert sorted(rows) == sorted(rows_of(alone.next_batches()))


def test_sources_are_drawn_by_weight(run):
    data = opened(run())
    documents = []
    for _ in range(200):
        documents.extend(
            " ".join(rows_of(data.next_batches())).replace("many", "|many").replace("few", "|few").split("|")
        )

    share = sum(text.startswith("few") for text in documents) / sum(bool(text) for text in documents)

    assert share == pytest.approx(2 / 3, abs=0.02)


def test_an_epoch_without_weights_has_every_sample_once(run):
    sources = [source(item.path) for item in run().data.train]
    data = opened(run(**{"data.train": sources}))

    seen = []
    while data.epoch == 0:
        batches = data.next_batches()
        seen.extend(rows_of(batches))

    text = "".join(seen)
    assert all(text.count(f"many {number} ") >= 1 for number in range(40))
    assert all(text.count(f"few {number} ") >= 1 for number in range(15))


@pytest.mark.parametrize(
    "changes", [{"seed": 8}, {"training.seq_len": 40}, {"task": "pretrain"}, {"data.train": "reweighted"}]
)
def test_a_position_in_other_data_is_refused(run, changes):
    data = opened(run())
    data.next_batches()
    if "data.train" in changes:
        changes = {"data.train": [source(item.path, 1.0) for item in run().data.train]}

    with pytest.raises(UserError, match="are not those of the checkpoint"):
        opened(run(**changes)).seek(data.position)


def test_the_amount_of_data_is_said(run):
    said: list[str] = []

    data = opened(run(**{"training.seq_len": 14}), said=said)

    line, _ = said
    tokens = sum(data.samples.inputs)
    assert line.startswith(f"train data: {len(data.samples)} samples of {tokens} tokens; ")
    assert line.endswith(f"{55 - len(data.samples)} of 55 samples are longer than 14 tokens and were dropped")


def test_what_weights_come_to_is_said_in_tokens_and_passes(run):
    said: list[str] = []

    data = opened(run(), said=said)

    _, line = said
    many, few = int(data.samples.inputs[:40].sum()) / 40, int(data.samples.inputs[40:].sum()) / 15
    share = many / (many + 2 * few)
    assert line == (
        f"mixture: many {share:.1%} of the tokens, 0.46 passes an epoch;"
        f" few {1 - share:.1%} of the tokens, 2.44 passes an epoch"
    )


def test_a_weight_is_of_the_files_that_its_pattern_matched(run, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"input": "", "output": name}) + "\n")
    first, second = (
        [source(tmp_path / left, 1.0), source(tmp_path / right, 3.0)]
        for left, right in (("[ab].jsonl", "c.jsonl"), ("a.jsonl", "[bc].jsonl"))
    )
    one = opened(run(**{"data.train": first}))
    one.next_batches()

    other = opened(run(**{"data.train": second}))

    assert (one.samples.summary.per_source, other.samples.summary.per_source) == ([2, 1], [1, 2])
    with pytest.raises(UserError, match="are not those of the checkpoint"):
        other.seek(one.position)


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_has_every_sample_of_a_source_once_and_equally_many_batches_on_each_rank(run, world_size):
    ranks = [
        evaluation_sources(run(), BYTES, on(Placement(rank, world_size, rank)), print) for rank in range(world_size)
    ]

    for of_ranks, name, count in paired(paired(*ranks), ("many", "few"), (40, 15)):
        assert {source.name for source in of_ranks} == {name}
        assert len({len(source.batches) for source in of_ranks}) == 1
        text = "".join(row for source in of_ranks for row in rows_of(source.batches))
        assert all(text.count(f"{name} {number} ") == 1 for number in range(count))
        assert text.count("many") + text.count("few") == count
        targets = sum(batch.target_tokens for source in of_ranks for batch in source.batches)
        assert {source.targets for source in of_ranks} == {targets}


def test_evaluation_batches_are_the_same_each_time(run):
    batches = evaluation_sources(run(), BYTES, on(Placement(0, 1, 0)), print)[0].batches

    assert rows_of(batches) == rows_of(batches)
    assert all((batch.targets != IGNORED).sum() == batch.target_tokens > 0 for batch in batches)


def test_sources_are_called_by_the_names_of_their_files_where_those_tell_them_apart():
    assert short_names(["a/zh.jsonl", "a/en*.jsonl"]) == ["zh", "en*"]
    assert short_names(["a/held.jsonl", "b/held.jsonl"]) == ["a/held.jsonl", "b/held.jsonl"]
