"""What runs on the nodes and inside the cpmlive-flash image (Python 3.8.10) needs nothing newer.

That interpreter is not here, so that vermin reads the code for it.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "cpm_cluster"
ON_NODES = [
    "__init__.py",
    "agent",
    "diagnosis",
    "launch/plan.py",
    "launch/program.py",
    "launch/runtimes",
    "runs/heartbeats.py",
    "runs/layout.py",
    "runs/records.py",
    "runs/run.py",
    "runs/state.py",
    "runs/telemetry.py",
    "specs/problems.py",
    "training",
]
# get_type_hints evaluates the annotations of these when a plan or a settings file is read.
EVALUATED = ["launch/plan.py", "training/settings.py"]


def _vermin(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("vermin", path=str(Path(sys.executable).parent)) or shutil.which("vermin")
    assert program, "vermin comes with the test extra: pip install -e '.[test]'"
    argv = [program, "-t=3.8-", "--no-tips", "--violations", *map(str, arguments)]
    return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("part", ON_NODES)
def test_it_needs_no_newer_python(part: str) -> None:
    done = _vermin(PACKAGE / part)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", EVALUATED)
def test_nor_do_annotations_that_are_evaluated(file: str) -> None:
    done = _vermin("--eval-annotations", PACKAGE / file)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("part", ON_NODES)
def test_other_annotations_are_never_evaluated(part: str) -> None:
    """`list[str] | None` may stand there, as long as Python does not look."""
    for file, tree in _parsed(part):
        lazy = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
        annotated = any(isinstance(node, (ast.FunctionDef, ast.AnnAssign)) for node in ast.walk(tree))
        assert lazy or not annotated, file


@pytest.mark.parametrize("part", ON_NODES)
def test_nor_is_there_a_method_that_vermin_knows_only_on_literals(part: str) -> None:
    newer = {"removeprefix", "removesuffix", "is_relative_to", "with_stem", "readlink", "bit_count", "hardlink_to"}
    for file, tree in _parsed(part):
        methods = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and not _is_os(node.value)]
        used = {node.attr for node in methods}
        assert not used & newer, file


def _is_os(node: ast.expr) -> bool:
    """os.readlink is as old as Python."""
    return isinstance(node, ast.Name) and node.id == "os"


def _parsed(part: str) -> Iterator[tuple[Path, ast.Module]]:
    path = PACKAGE / part
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        yield file, ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize("line", ["'x'.removeprefix('y')", "match 1:\n    case 1: pass", "import tomllib"])
def test_vermin_finds_what_is_newer(line: str, tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text(line + "\n")
    assert _vermin(tmp_path / "new.py").returncode == 1
