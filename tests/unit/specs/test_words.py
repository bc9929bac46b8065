"""Words of other tools, and the keys of a job file that they stand for."""

from __future__ import annotations

import pytest

from cpm_cluster.specs.schema import json_schema
from cpm_cluster.specs.words import _ELSEWHERE, meant_by


def keys(schema, path=""):
    """All dotted keys of a schema."""
    for option in [schema, *schema.get("anyOf", [])]:
        for name, child in option.get("properties", {}).items():
            yield f"{path}{name}"
            yield from keys(child, f"{path}{name}.")


KEYS = set(keys(json_schema("job")))


@pytest.mark.parametrize("key", _ELSEWHERE)
def test_what_is_proposed_is_a_key(key):
    assert key in KEYS


def test_no_word_stands_for_two_keys():
    words = [word for row in _ELSEWHERE.values() for word in row.split()]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("--shm-size".strip("-"), "resources.shm"),
        ("Learning_Rate", "training.lr"),
        ("partition", "slurm.partition"),  # right, but for its section
        ("ipc", "container.ipc"),
        ("flux_capacitor", None),
        ("", None),
    ],
)
def test_a_word_means_a_key(word, key):
    assert meant_by(word) == key
