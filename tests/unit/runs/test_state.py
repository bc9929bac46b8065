"""Every state of a run, told from its records and the scheduler's word on whether it lives."""

from __future__ import annotations

import pytest

from cpm_cluster.runs.state import read_state


def name_of(made, alive=False):
    return read_state(made.run, alive).name


def test_a_run_that_nobody_submitted(made_run):
    state = read_state(made_run().run, alive=False)
    assert (state.name, state.attempt, state.exit_code, state.ended) == ("prepared", 0, None, False)


def test_a_run_that_waits_for_its_agent(made_run):
    made = made_run().submitted()
    assert name_of(made, alive=True) == "queued"
    assert name_of(made) == "lost"
    assert name_of(made.cancelled()) == "cancelled"


def test_a_run_that_runs(made_run):
    made = made_run().submitted().phase("prepare")
    state = read_state(made.run, alive=True)
    assert (state.name, state.phase, state.attempt, state.exit_code) == ("running", "prepare", 1, None)


def test_the_phase_of_a_training_is_the_trainers_word_once_it_has_one(made_run):
    made = made_run().file("progress.json", {"phase": "done", "updated_at": 1}).submitted().phase("training")
    assert read_state(made.run, alive=True).phase == "starting"  # that word is of an earlier attempt
    made.file("progress.json", {"phase": "loading", "updated_at": 4e9})
    assert read_state(made.run, alive=True).phase == "loading"
    made.phase("cleanup")
    assert read_state(made.run, alive=True).phase == "cleanup"


def test_the_phase_of_any_other_program_is_the_agents_word(made_run):
    made = made_run(trainer=False).submitted().phase("training")
    assert read_state(made.run, alive=True).phase == "training"


@pytest.mark.parametrize(
    ("code", "name"), [(0, "finished"), (85, "stopped"), (1, "failed"), (2, "failed"), (137, "failed"), (143, "failed")]
)
def test_the_exit_code_decides_how_a_run_ended(made_run, code, name):
    state = read_state(made_run().submitted().phase("training").exited(code).run, alive=False)
    assert (state.name, state.exit_code, state.ended) == (name, code, True)


def test_without_an_exit_record_a_run_that_is_gone_is_lost(made_run):
    state = read_state(made_run().submitted().phase("training").run, alive=False)
    assert (state.name, state.exit_code, state.phase) == ("lost", None, "starting")


def test_while_it_lives_an_exit_record_is_not_its_end(made_run):
    assert name_of(made_run().submitted().phase("cleanup").exited(0), alive=True) == "running"


def test_a_cancelled_run(made_run):
    assert name_of(made_run().submitted().phase("training").cancelled()) == "cancelled"
    assert name_of(made_run().submitted().phase("training").cancelled().exited(143)) == "cancelled"


def test_a_training_that_finished_its_last_step_while_it_was_cancelled(made_run):
    made = made_run().submitted().phase("training").cancelled().exited(0, stopped_by="SIGTERM")
    assert name_of(made) == "finished"


def test_another_program_that_says_0_when_it_is_cancelled_has_not_finished(made_run):
    made = made_run(trainer=False).submitted().phase("training").cancelled()
    assert name_of(made.exited(0, stopped_by="SIGTERM")) == "cancelled"
    assert name_of(made.exited(0, stopped_by=None)) == "finished"


def test_a_resumed_run_is_judged_by_its_newest_attempt(made_run):
    made = made_run().submitted().phase("training").exited(1)
    made.submitted(attempt=2)
    queued = read_state(made.run, alive=True)
    assert (queued.name, queued.phase, queued.attempt) == ("queued", "", 1)
    assert name_of(made) == "lost"  # the second never began, and the first is not its end
    made.phase("prepare", attempt=2)
    assert read_state(made.run, alive=True).attempt == 2
    assert name_of(made) == "lost"
    assert name_of(made.exited(0, attempt=2)) == "finished"


def test_an_attempt_that_slurm_requeued_is_part_of_the_same_submission(made_run):
    made = made_run().submitted().phase("training").exited(85).phase("training", attempt=3).exited(0, attempt=3)
    assert (name_of(made), read_state(made.run, False).attempt) == ("finished", 3)


def test_several_nodes(made_run):
    made = made_run(nodes=2).submitted().phase("training").phase("training", node="n2")
    assert name_of(made.exited(0)) == "lost"  # the other node never said
    assert name_of(made.exited(0, node="n2")) == "finished"
    assert name_of(made.exited(85, node="n2")) == "stopped"


def test_the_node_that_failed_first_gives_the_exit_code(made_run):
    made = made_run(nodes=3).submitted().phase("training")
    made.exited(85, ended=1).exited(3, node="n2", ended=2).exited(1, node="n3", ended=3)
    state = read_state(made.run, alive=False)
    assert (state.name, state.exit_code) == ("failed", 3)


def test_a_script_that_somebody_submitted_by_hand(made_run):
    """There is no scheduler to ask: the agents' records alone tell."""
    made = made_run(nodes=2).phase("training")
    assert name_of(made) == "running"
    assert name_of(made.exited(0)) == "running"
    assert name_of(made.exited(0, node="n2")) == "finished"


def test_the_progress_comes_with_the_state(made_run):
    made = made_run().submitted().file("progress.json", {"step": 3, "steps": 9}).phase("training")
    assert read_state(made.run, alive=True).progress == {"step": 3, "steps": 9}


@pytest.mark.parametrize("content", ['{"step": "x"}', '{"step": null}', '{"loss": "low"}', "[1]", "{}", "[" * 100_000])
def test_progress_that_is_none_is_left_out(made_run, content):
    made = made_run().submitted().phase("training").file("progress.json", content)
    state = read_state(made.run, alive=True)
    assert (state.name, state.phase, state.progress) == ("running", "starting", None)
