"""Combinations that cannot work, found before anything is submitted. Each check is one rule of the field."""

from __future__ import annotations

import re

from cpm_cluster.specs.checks import (  # noqa: F401  each registers its checks
    command,
    container,
    image,
    resources,
    runtime,
    slurm,
    task,
    training,
)
from cpm_cluster.specs.checks.rules import CHECKS
from cpm_cluster.specs.fields import Reading
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.nodes import ListNode, MapNode, Node
from cpm_cluster.specs.problems import Location, Problem


def check_job(spec: JobSpec, tree: MapNode, reading: Reading) -> None:
    """Notes what cannot work. Where a key could not be read, the checks that read it have nothing to say."""
    unread = frozenset(key for _, keys in CHECKS for key in keys if reading.is_unread(key))
    for check, keys in CHECKS:
        if unread.isdisjoint(keys):
            for path, what in check(spec):
                reading.problems.append(Problem(_where(tree, path), path, what))


def is_possible(spec: JobSpec) -> bool:
    """Whether no check finds anything; of a job that was changed after it was read."""
    return not any(True for check, _ in CHECKS for _ in check(spec))


def _where(node: Node, path: str) -> Location:
    """The place of a dotted key below `node`, or of the nearest thing above it that is written."""
    if isinstance(node, MapNode):
        for name, child in node.entries.items():
            if path == name:
                return child.where
            if path.startswith((name + ".", name + "[")):
                return _where(child, path[len(name) :].removeprefix("."))
    if isinstance(node, ListNode) and (index := re.fullmatch(r"\[(\d+)\]", path)):
        return node.items[int(index[1])].where
    return node.where
