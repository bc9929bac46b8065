"""A small catalogue of its own for the tests of the specs, and the way a job file is read with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpm_cluster.specs.catalogue import Catalogue
from cpm_cluster.specs.compose import load_job
from cpm_cluster.specs.problems import SpecError

# What a job on this machine's CPUs needs; tests add their lines to it.
JOB = """\
name: demo
cluster: local
profile: cpu-2
model: tiny
data: {train: rows.jsonl}
"""


@pytest.fixture(scope="session")
def catalogue():
    return Catalogue((Path(__file__).parent / "configs",))


@pytest.fixture
def load(catalogue, tmp_path, monkeypatch):
    """Composes a job that is given as text; it lies in job.yaml of an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def compose(text, *overrides, catalogue=catalogue, detected="local"):
        Path("job.yaml").write_text(text, "utf-8")
        return load_job(Path("job.yaml"), overrides, catalogue, detected)

    return compose


@pytest.fixture
def refused(load):
    """The messages for a job that cannot be composed."""

    def messages(text, *overrides, **options):
        with pytest.raises(SpecError) as caught:
            load(text, *overrides, **options)
        return [str(problem) for problem in caught.value.problems]

    return messages


@pytest.fixture(scope="session")
def cpu_job():
    return JOB
