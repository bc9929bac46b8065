"""What runs on the nodes and inside the cpmlive-flash image (Python 3.8.10) needs nothing newer.

Vermin reads the code for it; where this machine has a Python 3.8, that reads and runs it, too. With torch 1.13.1 beside
it, the trainer's own tests do: `make test-python38`.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "runs"))

from made_runs import made_run  # noqa: E402, F401

from cpm_cluster.launch.plan import Program  # noqa: E402
from cpm_cluster.runs.records import read_events  # noqa: E402
from cpm_cluster.runs.run import new_run_id  # noqa: E402

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


@pytest.mark.parametrize("part", ON_NODES)
def test_nor_is_anything_evaluated_that_took_no_types_then(part: str) -> None:
    """`Rule = Callable[[int], str]` needs typing's Callable; vermin takes that of collections.abc for as old."""
    for file, tree in _parsed(part):
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
        plain = {
            alias.asname or alias.name for node in imports if "collections" in str(node.module) for alias in node.names
        }
        used = {
            node.value.id
            for node in _evaluated(tree)
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)
        }
        assert not used & (plain | {"dict", "frozenset", "list", "set", "tuple", "type"}), file


def _evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """All below a node but annotations."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from _evaluated(child)


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


@pytest.fixture(scope="module")
def python38() -> str:
    """A Python 3.8 of this machine: on the PATH, or one of pyenv's."""
    on_path = [found] if (found := shutil.which("python3.8")) else []
    of_pyenv = sorted(map(str, Path.home().glob(".pyenv/versions/3.8.*/bin/python3.8")))
    for candidate in on_path + of_pyenv:  # pyenv's stand-in on the PATH may stand for nothing
        asked = subprocess.run(
            [candidate, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True
        )
        if asked.stdout == "(3, 8)\n":
            return candidate
    pytest.skip("no python3.8 on the PATH or among pyenv's versions")


def _run(python: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [python, *words], env={**environment, **variables}, cwd="/", capture_output=True, text=True, timeout=60
    )


# Imports each module that it is named; prints, for those that this fails for, what was missing.
IMPORT = """
import importlib, json, sys, warnings
warnings.simplefilter("error")
missing = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing[name] = error.name
print(json.dumps(missing))
"""
OF_THE_IMAGE = {"torch", "numpy", "safetensors", "tokenizers", "tensorboardX", "pytrie"}


def test_python_3_8_imports_every_module(python38: str) -> None:
    """All but those of the trainer that want what only the image has beside Python."""
    files = [file for part in ON_NODES for file, _ in _parsed(part) if file.stem not in ("__init__", "__main__")]
    names = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]
    done = _run(python38, "-c", IMPORT, *names)
    assert done.returncode == 0, done.stderr
    missing = json.loads(done.stdout)
    assert all(name.startswith("cpm_cluster.training.") for name in missing), missing
    assert set(missing.values()) <= OF_THE_IMAGE


def test_python_3_8_compiles_what_it_cannot_import_here(python38: str) -> None:
    files = [str(file) for file, _ in _parsed("training")]
    code = "import sys; from pathlib import Path; [compile(Path(f).read_bytes(), f, 'exec') for f in sys.argv[1:]]"
    done = _run(python38, "-W", "error", "-c", code, *files)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_agent_under_python_3_8_runs_a_program_and_records_its_end(python38: str, made_run) -> None:  # noqa: F811
    script = 'echo "run $CPM_RUN_ID"; exit 7'
    run = made_run(new_run_id("old"), trainer=False, program=Program("none", "", 1, ("bash", "-c", script))).run
    run.files.code.mkdir()
    done = _run(python38, "-m", "cpm_cluster.agent", str(run.files.root), CPM_RUN_ID=run.id)
    assert (done.returncode, done.stderr) == (7, "")
    (log,) = run.files.root.glob("attempt-1/node-0/node.log")
    assert log.read_text() == f"run {run.id}\n"
    told = [event.get("phase", event["kind"]) for event in read_events(run.files.root / "events")]
    assert (told[0], told[-1]) == ("prepare", "exit")


def test_a_batch_script_may_ask_python_3_8_whether_to_go_on(python38: str, made_run) -> None:  # noqa: F811
    made = made_run(new_run_id("old")).submitted().phase("training").exited(137)
    made.rank_error(0, 1.0, "OutOfMemoryError")
    done = _run(python38, "-m", "cpm_cluster.agent", str(made.run.files.root), "end", "137")
    assert (done.returncode, "Traceback" in done.stderr) == (137, False), done.stderr
