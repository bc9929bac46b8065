"""What the ranks were started with, against the plan and each other."""

from __future__ import annotations

import pytest
from made_runs import ANY_PROGRAM

from cpm_cluster.agent.nccl_environment import differences, is_recorded, planned
from cpm_cluster.agent.surroundings import node_facts
from cpm_cluster.launch.plan import Setting

ASKED = {"NCCL_DEBUG": "WARN", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "61000", "WORLD_SIZE": "2"}


def ranks(first=None, second=None):
    return {0: {**ASKED, "RANK": "0", **(first or {})}, 1: {**ASKED, "RANK": "1", **(second or {})}}


def told(found):
    return {each["variable"]: each["how"] for each in found}


def test_ranks_that_have_what_the_plan_says():
    assert differences(ranks(), ASKED) == []


def test_a_value_that_an_image_has_set_over_the_plan():
    found = differences(ranks({"NCCL_DEBUG": "INFO"}, {"NCCL_DEBUG": "INFO"}), ASKED)
    expected = {"variable": "NCCL_DEBUG", "how": "not as planned", "planned": "WARN", "ranks": {0: "INFO", 1: "INFO"}}
    assert found == [expected]


def test_a_variable_that_nobody_asked_for_and_one_that_has_not_arrived():
    extra = {"NCCL_SOCKET_IFNAME": "eth0"}
    assert told(differences(ranks(extra, extra), {**ASKED, "NCCL_IB_HCA": "mlx5"})) == {
        "NCCL_IB_HCA": "not as planned",
        "NCCL_SOCKET_IFNAME": "not planned",
    }


def test_a_variable_of_one_rank_alone():
    (found,) = differences(ranks({"GLOO_SOCKET_IFNAME": "eth1"}), ASKED)
    assert (found["how"], found["ranks"]) == ("differs between ranks", {0: "eth1", 1: None})


def test_ranks_of_another_world_than_planned():
    """What BMTrain would not notice: each trains alone."""
    alone = {"WORLD_SIZE": "1"}
    assert told(differences(ranks(alone, alone), ASKED)) == {"WORLD_SIZE": "not as planned"}


def test_what_torchrun_and_the_driver_set_is_expected():
    usual = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert differences(ranks(usual, usual), ASKED) == []
    off = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    assert told(differences(ranks(off, off), ASKED)) == {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "not planned"}


@pytest.mark.parametrize("name", ["NCCL_DEBUG", "TORCH_NCCL_BLOCKING_WAIT", "GLOO_SOCKET_IFNAME", "RANK", "WORLD_SIZE"])
def test_what_is_recorded(made_run, name):
    assert is_recorded(made_run().run.plan, name)


@pytest.mark.parametrize("name", ["HOME", "TOKEN", "MY_NCCL_DEBUG", "RANK_TOKEN", "NCCL_SECRET"])
def test_what_is_not_and_no_secret_whatever_its_name(made_run, name):
    assert not is_recorded(made_run(secrets=("NCCL_SECRET",)).run.plan, name)


def test_what_the_plan_asks_for(made_run):
    settings = [Setting(name, name.lower(), "job") for name in ("NCCL_DEBUG", "HOME", "NCCL_SECRET")]
    made = made_run(environment=tuple(settings), secrets=("NCCL_SECRET",), nodes=3)
    node = node_facts(made.run.files, {"CPM_MASTER_ADDR": "10.0.0.1", "CPM_MASTER_PORT": "61000", "CPM_ATTEMPT": "1"})
    asked = planned(made.run.plan, node)
    expected = {"NCCL_DEBUG": "nccl_debug", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "61000", "WORLD_SIZE": "6"}
    assert asked == expected
    other = made_run("b-20260102-030405-0001", trainer=False, program=ANY_PROGRAM).run.plan
    assert planned(other, node) == {}


def test_where_the_ranks_of_a_users_own_torchrun_meet_is_its_own_affair():
    """The c10d rendezvous gives them a name and a port of its own."""
    met = {"MASTER_ADDR": "localhost", "MASTER_PORT": "37647"}
    assert differences(ranks(met, met), {"NCCL_DEBUG": "WARN"}) == []
    assert told(differences(ranks(met), {"NCCL_DEBUG": "WARN"})) == {
        "MASTER_ADDR": "differs between ranks",
        "MASTER_PORT": "differs between ranks",
    }
