"""What is refused before a job is prepared, although it can be planned."""

from __future__ import annotations

import pytest
from launch_jobs import packaged

from cpm_cluster.specs.problems import SpecError


def test_a_job_for_an_engine_that_the_trainer_has_not_ends_before_the_queue() -> None:
    with_deepspeed = "image={tag: mine, deepspeed: 0.16.4, torch: 2.7.1}"

    with pytest.raises(SpecError) as refused:
        packaged("full_10b", "engine=deepspeed", with_deepspeed)

    assert str(refused.value).startswith("--set engine=deepspeed: engine: the trainer has no deepspeed")
    assert "engine: command" in str(refused.value)
