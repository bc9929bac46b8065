"""What outlives an attempt: whether there is another one, and where it may run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_cluster.diagnosis.retry import AVOIDED_FOR_S, BUDGETS, MOST_AVOIDED, Ending, avoided, decide, read_endings
from cpm_cluster.diagnosis.verdict import Verdict

NOW = 1_800_000_000.0


def verdict(category: str, transient: bool = True) -> Verdict:
    return Verdict(category, "It ended.", transient, "do something")


def endings(category: str, count: int, step: int = 100, node: str | None = None) -> list[Ending]:
    return [Ending(number + 1, category, step, node, NOW + number) for number in range(count)]


def again(category: str, history: list[Ending], submitted: float = 0.0, transient: bool = True) -> bool:
    return decide(verdict(category, transient), history, submitted).again


@pytest.mark.parametrize("category", ["preempted", "time limit", "node", "fabric", "lost", "killed"])
def test_what_comes_from_outside_is_worth_another_attempt(category):
    assert again(category, endings(category, 1))


@pytest.mark.parametrize("category", ["user error", "out of memory", "diverged", "program", "crashed", "cancelled"])
def test_what_the_job_does_to_itself_is_not(category):
    assert not again(category, endings(category, 1))


def test_a_node_error_that_every_node_would_have_is_not():
    assert not again("node", endings("node", 1), transient=False)


@pytest.mark.parametrize("category", BUDGETS)
def test_a_budget_ends(category):
    assert again(category, endings(category, BUDGETS[category]))
    refused = decide(verdict(category), endings(category, BUDGETS[category] + 1), 0.0)
    assert not refused.again
    assert f"{BUDGETS[category] + 1} times ({category}) without a new checkpoint" in refused.why


@pytest.mark.parametrize("category", BUDGETS)
def test_a_new_checkpoint_gives_the_budget_back(category):
    history = [*endings(category, 50, step=100), *endings(category, 1, step=120)]
    assert again(category, history)


def test_each_category_has_its_own():
    assert again("fabric", [*endings("node", 4), *endings("fabric", 1)])


def test_so_does_a_person_who_submits_it_again():
    history = endings("killed", 10)
    assert not again("killed", history)
    assert again("killed", history, submitted=history[-1].time)


def test_nodes_at_fault_are_left_out_for_a_day():
    old = Ending(1, "node", 0, "g2001", NOW - AVOIDED_FOR_S - 1)
    new = Ending(2, "node", 0, "g2002", NOW)
    assert avoided([old, new]) == ("g2002",)
    assert decide(verdict("node"), [old, new], 0.0).avoid == ("g2002",)


@given(st.lists(st.sampled_from([None, *(f"g{2001 + n}" for n in range(8))]), min_size=1, max_size=20))
def test_at_most_four_and_the_newest_ones(nodes):
    found = avoided([Ending(i, "node", 0, node, NOW + i) for i, node in enumerate(nodes)])
    named = [node for node in reversed(nodes) if node]
    assert len(found) == len(set(found)) == min(MOST_AVOIDED, len(set(named)))
    assert not named or found[0] == named[0]


def test_endings_are_read_from_events():
    events = [
        {"kind": "phase", "time": 1.0},
        {"kind": "ending", "time": 2.0, "attempt": 1, "category": "node", "step": 7, "node": "g2003", "cause": "…"},
    ]
    assert read_endings(events) == [Ending(1, "node", 7, "g2003", 2.0, "…")]
