"""launch.json: a plan survives it unchanged, and nothing else passes for one."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import launch_jobs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launch_jobs import MINIMAL, packaged, written

from cpm_cluster.launch.plan import FORMAT, LaunchPlan

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
PLANS = st.builds(LaunchPlan, trainer=st.none() | st.dictionaries(st.text(), JSON, max_size=3), format=st.just(FORMAT))


class TestRoundTrip:
    @settings(derandomize=True, deadline=None, max_examples=60)
    @given(PLANS)
    def test_any_plan_is_read_back_equal(self, plan: LaunchPlan) -> None:
        assert LaunchPlan.from_json(plan.to_json()) == plan

    @pytest.mark.parametrize("job", sorted(path.stem for path in launch_jobs.JOBS.glob("*.yaml")))
    def test_so_is_the_plan_of_a_job_that_ships(self, job: str) -> None:
        plan = packaged(job).plan
        assert LaunchPlan.from_json(plan.to_json()) == plan

    def test_the_file_is_for_people_too(self, tmp_path: Path) -> None:
        text = written(tmp_path, MINIMAL, "env.TITLE=九格").plan.to_json()
        assert "九格" in text
        assert text.count("\n") > 50
        assert json.loads(text)["nodes"] == 1

    def test_keys_of_a_later_version_are_passed_over(self) -> None:
        plan = packaged("lora_100b").plan
        assert LaunchPlan.from_json(_changed(plan, hint="new")) == plan


def _changed(plan: LaunchPlan, **changes: Any) -> str:
    return json.dumps({**dataclasses.asdict(plan), **changes})


def _refusal(text: str) -> str:
    with pytest.raises(ValueError, match="^is not ") as raised:
        LaunchPlan.from_json(text)
    assert type(raised.value) is ValueError
    return str(raised.value)


class TestRefusal:
    """Each is read after the file's name: `runs/x/launch.json is not JSON: …`."""

    @pytest.mark.parametrize("text", ["", "{", "launch: me", '{"format": 1,}', "[" * (2 * sys.getrecursionlimit())])
    def test_no_json(self, text: str) -> None:
        assert _refusal(text).startswith("is not JSON: ")

    @pytest.mark.parametrize("text", ["[]", "1", "null", '"plan"', "{}", '{"format": 2}', '{"format": "1"}'])
    def test_json_of_something_else(self, text: str) -> None:
        assert _refusal(text) == "is not a launch plan of format 1, the only one that this version reads"

    def test_a_plan_that_lost_something(self) -> None:
        assert _refusal('{"format": 1, "run_id": "x"}').startswith("is not a launch plan: it has no run_dir, job_name,")

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"nodes": "8"}, "nodes is text instead of a whole number"),
            ({"nodes": 1.5}, "nodes is a number instead of a whole number"),
            ({"nodes": True}, "nodes is true or false instead of a whole number"),
            ({"requeue": 1}, "requeue is a whole number instead of true or false"),
            ({"run_dir": None}, "run_dir is nothing instead of text"),
            ({"batch": "--nodes=1"}, "batch is text instead of a list"),
            ({"batch": ["--nodes=1"]}, "batch[0] is text instead of a mapping"),
            ({"batch": [{"name": "nodes"}]}, "batch[0] has no value, set_by, why"),
            ({"container": []}, "container is a list instead of a mapping"),
            ({"container": {"image": "x"}}, "container has no archive, shm_bytes, shm_set_by, shm_why,"),
            ({"secrets": [1]}, "secrets[0] is a whole number instead of text"),
            ({"trainer": "x"}, "trainer is text instead of a mapping"),
        ],
    )
    def test_a_plan_with_something_wrong_in_it_says_where(self, changes: dict[str, Any], what: str) -> None:
        assert _refusal(_changed(packaged("lora_100b").plan, **changes)).startswith(f"is not a launch plan: {what}")

    @settings(derandomize=True, deadline=None, max_examples=100)
    @given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(LaunchPlan)]), JSON, max_size=4))
    def test_whatever_stands_in_it_it_is_a_plan_or_a_sentence(self, changes: dict[str, Any]) -> None:
        text = _changed(packaged("lora_100b").plan, **changes)
        try:
            plan = LaunchPlan.from_json(text)
        except ValueError as error:
            assert str(error).startswith("is not a launch plan")
        else:
            assert json.loads(plan.to_json()) == json.loads(text)
