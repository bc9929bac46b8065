"""Broken job files, and word for word what their authors are told: broken/NN-slug.yaml with NN-slug.txt beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpm_cluster.specs.compose import load_job
from cpm_cluster.specs.problems import SpecError

FOLDER = Path(__file__).parent / "broken"
JOBS = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("job", JOBS, ids=[job.stem for job in JOBS])
def test_the_author_of_a_broken_job_is_told_exactly_this(job, catalogue, monkeypatch):
    monkeypatch.chdir(FOLDER)

    with pytest.raises(SpecError) as caught:
        load_job(Path(job.name), [], catalogue, "local")

    assert str(caught.value).splitlines() == job.with_suffix(".txt").read_text("utf-8").splitlines()


def test_every_broken_job_has_its_messages():
    assert [job.stem for job in JOBS] == sorted(text.stem for text in FOLDER.glob("*.txt"))
    assert len(JOBS) >= 25
