"""Which log `cpm logs` prints, and what it says where there is none."""

from __future__ import annotations

from click.testing import CliRunner

from cpm_cluster.cli.logs import command


def logs(made, *words):
    return CliRunner().invoke(command, [made.run.id, *words, "--runs-dir", str(made.run.files.root.parent)])


def test_ranks_that_never_began_have_no_log_and_the_launcher_says_why(made_run):
    made = made_run().file("attempt-1/node-0/node.log", "No module named 'torch'\n")

    refused = str(logs(made).exception)

    assert "has no rank-0.log, only node.log" in refused
    assert refused.endswith(f"cpm logs {made.run.id} --launcher prints it")
    assert logs(made, "--launcher").output == "No module named 'torch'\n"


def test_a_rank_that_the_run_has_not_is_no_reason_to_look_elsewhere(made_run):
    made = made_run().file("attempt-1/node-0/node.log", "").file("attempt-1/node-0/rank-0.log", "step 1\n")

    assert str(logs(made, "--rank", "5").exception).endswith("has no rank-5.log, only node.log, rank-0.log")
