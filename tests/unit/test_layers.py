"""Data flows downwards once: who may import whom, read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "cpm_cluster"
LAYERS: dict[str, set[str]] = {
    "specs": set(),
    "planner": {"specs"},
    "launch": {"specs", "planner"},
    "runs": {"launch"},
    "calibration": {"specs", "planner", "runs"},
    "diagnosis": {"runs", "specs"},
    "agent": {"launch", "runs", "diagnosis"},  # the batch script starts a job again as the verdict says
    "schedulers": {"launch", "runs", "agent"},
    "monitoring": {"runs", "diagnosis", "schedulers"},
    "dashboard": {"runs", "schedulers", "diagnosis", "monitoring", "planner"},
    "training": set(),
    "sandbox": {"specs", "runs"},  # a Slurm cluster on one machine, to try things on: only cli knows of it
}
LAYERS["cli"] = set(LAYERS)
# Imported by name at run time, which no import statement shows.
DYNAMIC = {"cpm_cluster.launch.runtimes": PACKAGE / "launch" / "runtimes"}
MODULES = {
    ".".join(("cpm_cluster", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def _imported(module: str, path: Path) -> Iterator[str]:
    """Modules that a file imports, anywhere in it; `from a import b` gives a.b where that is a module of ours."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*parts, *filter(None, [node.module])])
            found = [f"{stem}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else stem for name in found)


def _layer(module: str) -> str:
    """`specs` of cpm_cluster.specs.job; nothing of cpm_cluster itself and of others' modules."""
    parts = module.split(".")
    return parts[1] if parts[0] == "cpm_cluster" and len(parts) > 1 else ""


def _reached(module: str) -> set[str]:
    """All modules of ours that are loaded with one, their packages included."""
    found: set[str] = set()
    left = [module]
    while left:
        name = left.pop()
        if name in found or name not in MODULES:
            continue
        found.add(name)
        left += [name.rpartition(".")[0], *_imported(name, MODULES[name])]
        left += [other for other, path in MODULES.items() if path.parent == DYNAMIC.get(name)]
    return found


def test_every_folder_of_the_package_is_a_layer() -> None:
    assert {_layer(module) for module in MODULES} - {""} == set(LAYERS)


def test_every_folder_with_code_is_installed() -> None:
    setup = ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg", encoding="utf-8")
    with_code = {module.rpartition(".")[0] for module, path in MODULES.items() if path.name != "__init__.py"}
    assert with_code <= set(setup["options"]["packages"].split())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_those_below_it(layer: str) -> None:
    against = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if _layer(module) == layer
        for name in _imported(module, path)
        if _layer(name) not in {"", layer, *LAYERS[layer]}
    ]
    assert against == []


def test_the_table_has_no_way_back() -> None:
    """Each layer stands above all that it may import, so that there can be no circle."""
    order = list(LAYERS)
    assert all(order.index(below) < order.index(layer) for layer in order for below in LAYERS[layer])


def test_the_node_agent_and_what_it_loads_need_nothing_but_the_standard_library() -> None:
    loaded = {name for module in MODULES if _layer(module) == "agent" for name in _reached(module)}
    assert {"cpm_cluster.launch.plan", "cpm_cluster.launch.runtimes.podman", "cpm_cluster.runs.records"} <= loaded
    roots = {name.split(".")[0] for module in loaded for name in _imported(module, MODULES[module])}
    assert roots - {"cpm_cluster"} <= sys.stdlib_module_names


def test_the_trainer_needs_nothing_of_ours_but_itself() -> None:
    loaded = {name for module in MODULES if _layer(module) == "training" for name in _reached(module)}
    assert {_layer(name) for name in loaded} == {"", "training"}


def test_the_package_itself_holds_its_version_and_loads_nothing() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (assignment,) = [node for node in tree.body if not (isinstance(node, ast.Expr) and ast.get_docstring(tree))]
    assert isinstance(assignment, ast.Assign)
    assert [target.id for target in assignment.targets if isinstance(target, ast.Name)] == ["__version__"]
    assert isinstance(assignment.value, ast.Constant)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import cpm_cluster.specs.job", ["cpm_cluster.specs.job"]),
        ("from cpm_cluster.specs import job", ["cpm_cluster.specs.job"]),
        ("from cpm_cluster.specs.job import JobSpec", ["cpm_cluster.specs.job"]),
        ("from ..specs import job", ["cpm_cluster.specs.job"]),
        ("from .plan import Setting", ["cpm_cluster.launch.plan"]),
        ("def late():\n    import json", ["json"]),
    ],
)
def test_every_way_to_import_is_seen(text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(text)
    assert list(_imported("cpm_cluster.launch.x", tmp_path / "x.py")) == expected
