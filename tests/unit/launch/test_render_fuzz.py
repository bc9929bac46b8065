"""Whatever stands in a job or cluster file is refused with a sentence, or runs word by word as the plan says."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launch_jobs import NOWHERE, RUN_ID, SUBMITTER
from slurm_stand_ins import StandIns

from cpm_cluster.cli.dry_run import as_text
from cpm_cluster.launch.plan import LaunchPlan, Setting, options
from cpm_cluster.launch.prepare import Prepared, prepare, read_job
from cpm_cluster.launch.runtimes import SYMBOLIC_NODE, run_argv, shell_argv
from cpm_cluster.launch.sbatch import agent_argv, batch_script, by_hand
from cpm_cluster.specs.catalogue import default_catalogue
from cpm_cluster.specs.problems import SpecError, printable

RUNTIMES = ("docker-rootless", "docker", "podman", "pyxis", "conda", "bare")

INJECTIONS = [
    "$(touch canary)",
    "`touch canary`",
    "; touch canary;",
    "\n touch canary\n",
    "'; touch canary; '",
    '"; touch canary; "',
    ">canary",
    "&& touch canary",
    "\\",
    "'",
    '"',
    "#",
    "#SBATCH --nodes=99",
    "%j",
    "$GPU_UUIDS",
    "${HOME}",
    "{a,b}",
    "*",
    "!!",
    "~",
    "--privileged",
    "=",
    ",",
    ":",
    "/..",
    " ",
    "\t",
    "九格",
    "\u3000",
    "\u202e",
    "e\u0301\U0001f468\u200d\U0001f469",
]
CONTROLS = ["\n", "\r", "\x00", "\x1b[2J", "\x7f", "\x85", "\ud800"]

ANY_TEXT = st.lists(st.sampled_from([*INJECTIONS, *CONTROLS, "a", "/"]) | st.text(max_size=6), max_size=6).map("".join)


def _spelt(without: str = "") -> st.SearchStrategy[str]:
    """Hostile text that is refused nowhere for its control characters; `without` leaves out more."""
    letters = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters=without)
    pieces = [p for p in INJECTIONS if not set(p) & {"\n", "\t", *without}]
    return st.lists(st.sampled_from(pieces) | st.text(letters, max_size=4), max_size=5).map("".join)


LINE = _spelt()
LINES = st.lists(LINE, max_size=3).map("\n".join)
PATH = LINE.map("/data/{}".format)
MOUNTED = _spelt(without=',:".').filter(str.isprintable).map("/mnt/x{}".format)
NAME = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
SLURM_NAME = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,12}", fullmatch=True)
VARIABLE = st.from_regex(r"X_[A-Z0-9]{1,6}", fullmatch=True)

SITE = st.fixed_dictionaries(
    {
        "scheduler": st.just("slurm"),
        "gpus_per_node": st.just(8),
        "cpus_per_node": st.none() | st.just(64),
        "gpu_request": st.sampled_from(["gres", "gpus-per-node"]),
        "default_time": st.just("12h"),
        "requeue": st.booleans(),
        "image_folder": PATH,
        "python": st.none() | LINE.map("/opt/{}".format),
        "env": st.dictionaries(VARIABLE, LINE, max_size=2),
        "network": st.fixed_dictionaries({"infiniband": st.booleans(), "topology_file": st.none() | PATH}),
    }
)
JOB = st.fixed_dictionaries(
    {
        "name": NAME,
        "description": LINES,
        "model": st.just({"base": "cpm-9g-8b", "layers": 2}),
        "cluster": st.just("./site.yaml"),
        "resources": st.fixed_dictionaries(
            {
                "gpus_per_node": st.sampled_from([0, 1, 2, 8]),
                "nodes": st.integers(1, 3),
                "memory_per_node": st.just("9G"),
            }
        ),
        "training": st.just({"precision": "fp32", "attention": "sdpa"}),
        "data": st.fixed_dictionaries({"train": st.lists(PATH, min_size=1, max_size=2), "eval": PATH}),
        "method": st.just("full") | PATH.map(lambda path: {"lora": {"init_from": path}}),
        "init_from": st.none() | PATH,
        "tokenizer": PATH,
        "code": st.none() | PATH,
        "samples": st.fixed_dictionaries({"prompts": st.lists(LINES, max_size=2)}),
        "mounts": st.dictionaries(MOUNTED, MOUNTED, max_size=2),
        "env": st.dictionaries(VARIABLE, LINE, max_size=3),
        "secrets": st.lists(st.from_regex(r"TOKEN_[A-Z]{1,4}", fullmatch=True), max_size=2, unique=True),
        "container": st.fixed_dictionaries({"workdir": st.none() | PATH}),
        "slurm": st.fixed_dictionaries(
            {
                "partition": SLURM_NAME,
                "account": st.none() | SLURM_NAME,
                "constraint": st.none() | st.from_regex(r"[A-Za-z0-9_.&|*\[\]()-]{1,12}", fullmatch=True),
                "extra": st.dictionaries(
                    st.from_regex(r"x-[a-z-]{1,8}", fullmatch=True),
                    st.from_regex(r"[A-Za-z0-9_.,:/@%=+\[\]-]{0,12}", fullmatch=True),
                    max_size=2,
                ),
            }
        ),
    }
)
COMMAND = st.lists(LINES, min_size=1, max_size=4)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> StandIns:
    return StandIns(tmp_path_factory.mktemp("stand-ins"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / RUN_ID
    folder.mkdir()
    return folder


def _prepared(folder: Path, job: dict[str, Any], site: dict[str, Any], run_dir: Path) -> Prepared:
    """The job, written as JSON, which is YAML, too."""
    offers: dict[str, Any] = dict.fromkeys(RUNTIMES, {}) | {"conda": {"environment": "cpm"}}
    offers["docker-rootless"] = {"version": "29.5", "modules": ["rootless-docker/default"]}
    for name, content in (("site", site | {"runtimes": offers}), ("job", job)):
        text = json.dumps(content, ensure_ascii=False)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    spec = read_job(folder / "job.yaml", (), default_catalogue(NOWHERE, NOWHERE), has_slurm=True)
    return prepare(spec, RUN_ID, run_dir, SUBMITTER)


def _with_runtime(job: dict[str, Any], runtime: str, command: list[str] | None) -> dict[str, Any]:
    image = None if runtime in ("conda", "bare") else {"tag": "cpm/modern:1.0"}
    engine = {"engine": "torch"} if command is None else {"engine": "command", "command": command}
    return job | engine | {"runtime": runtime, "image": image}


PLACES = """
    name description init_from method.lora.init_from tokenizer code runtime engine image.tag data.eval samples.prompts.0
    time_limit slurm.partition slurm.account slurm.nodelist slurm.exclude slurm.qos slurm.reservation slurm.constraint
    slurm.extra.comment slurm.extra.- container.workdir container.ipc env.A env.- secrets.0 mounts./a mounts.-
    model.base profile cluster signal_lead site.image_folder site.python site.default_partition site.node_names
    site.env.A site.env.- site.network.topology_file site.network.socket_interfaces site.driver site.description
""".split()


class TestHostileText:
    @pytest.mark.parametrize("runtime", RUNTIMES)
    def test_a_plan_is_run_as_it_is_shown(self, runtime: str, tmp_path: Path, slurm: StandIns, run_dir: Path) -> None:
        ran = 0

        @settings(derandomize=True, deadline=None, max_examples=15)
        @given(job=JOB, site=SITE, command=st.none() | COMMAND)
        def check(job: dict[str, Any], site: dict[str, Any], command: list[str] | None) -> None:
            nonlocal ran
            try:
                prepared = _prepared(tmp_path, _with_runtime(job, runtime, command), site, run_dir)
            except SpecError as error:
                _check_refusal(error)
                return
            ran += 1
            _check_all(prepared, slurm, run_dir)

        check()
        assert ran >= 10  # or the text was refused, and little was tested

    @pytest.mark.parametrize("place", PLACES)
    def test_any_text_anywhere_is_refused_or_run(
        self, place: str, tmp_path: Path, slurm: StandIns, run_dir: Path
    ) -> None:
        @settings(derandomize=True, deadline=None, max_examples=8)
        @given(ANY_TEXT)
        def check(text: str) -> None:
            job, site = _with_runtime(PLAIN_JOB, "docker", None), dict(PLAIN_SITE)
            target = site if place.startswith("site.") else job
            _put(target, place.removeprefix("site.").split("."), text)
            try:
                prepared = _prepared(tmp_path, job, site, run_dir)
            except SpecError as error:
                _check_refusal(error)
                return
            _check_all(prepared, slurm, run_dir)

        check()


PLAIN_JOB: dict[str, Any] = {
    "name": "tune",
    "model": {"base": "cpm-9g-8b", "layers": 2},
    "cluster": "./site.yaml",
    "resources": {"gpus_per_node": 2},
    "training": {"precision": "fp32"},
    "data": {"train": "/data/rows.jsonl"},
    "slurm": {"partition": "gpu1"},
}
PLAIN_SITE = {"scheduler": "slurm", "gpus_per_node": 8, "default_time": "12h"}


def _put(tree: dict[str, Any], path: list[str], text: str) -> None:
    """`text` at a dotted place; `-` makes it a key, `0` an item."""
    first, *rest = path
    if rest and rest[0] == "0":
        tree[first] = [text]
    elif first == "-":
        tree[text] = "x"
    elif rest:
        tree[first] = dict(tree.get(first) or {})
        _put(tree[first], rest, text)
    else:
        tree[first] = text


def _check_all(prepared: Prepared, slurm: StandIns, run_dir: Path) -> None:
    script = batch_script(prepared.plan)
    _check_heading(prepared.plan, script)
    _check_run(prepared.plan, script, slurm, run_dir)
    _check_by_hand(prepared.plan, slurm)
    _check_shown(prepared)


def _check_refusal(error: SpecError) -> None:
    """Each problem is one line that no terminal minds, and says where."""
    for problem in map(str, error.problems):
        assert problem.isprintable()
        assert ".yaml" in problem


def _check_heading(plan: LaunchPlan, script: str) -> None:
    """Comments and directives only, which say what the plan says."""
    lines = script.split("\n")
    heading = lines[: lines.index("")]
    assert heading[0] == "#!/bin/bash"
    assert all(line.startswith("#") for line in heading)
    directives = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    read = [(name, value if equals else None) for name, equals, value in (text.partition("=") for text in directives)]
    assert read == [(setting.name, setting.value) for setting in plan.batch]
    shown = [line.removeprefix("#   ").removesuffix(" \\") for line in heading if line.startswith("#   ")]
    assert shlex.split(" ".join(shown)) == list(map(printable, run_argv(plan, SYMBOLIC_NODE)))


def _check_run(plan: LaunchPlan, script: str, slurm: StandIns, run_dir: Path) -> None:
    """bash finds it sound, srun gets the argv of the plan, and nothing else happens."""
    subprocess.run(["bash", "-n"], input=script.encode(), check=True)
    slurm.forget()
    shutil.rmtree(run_dir / "attempt-1", ignore_errors=True)
    done = slurm.run(script.replace(f"    {shlex.quote(plan.agent_python)}\n", "    python3\n"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpm: attempt 1 begins\n", "")
    assert slurm.calls("srun") == [[*options(plan.step), "python3", *agent_argv(plan)[1:]]]
    assert slurm.calls("module") == ([["load", *plan.modules]] if plan.modules else [])
    assert slurm.left_behind() == []
    assert [path.name for path in run_dir.iterdir()] == ["attempt-1"]


def _check_by_hand(plan: LaunchPlan, slurm: StandIns) -> None:
    """What one is told to type does what it says; characters that cannot be typed are shown escaped."""
    slurm.forget()
    done = slurm.run("\n".join(by_hand(plan)))
    assert (done.returncode, done.stderr) == (0, "")
    assert slurm.calls("srun") == [_typed([*options(plan.interactive), "--pty", "bash"])]
    client = plan.runtime.split("-")[0]
    runs = [call for call in slurm.calls(client) if call[0] == "run"] if client != "pyxis" else []
    listed = ("GPU-a", "GPU-b") if client == "podman" else ("GPU-a,GPU-b",)
    if runs:
        assert runs == [_typed(shell_argv(plan, replace(SYMBOLIC_NODE, gpu_uuids=listed))[1:])]
    assert len(runs) == (client in ("docker", "podman", "conda"))
    assert slurm.left_behind() == []


def _typed(argv: list[str]) -> list[str]:
    return list(map(printable, argv))


def _check_shown(prepared: Prepared) -> None:
    """A dry run prints no control character, and a plan's JSON holds all of it."""
    assert not [c for c in as_text(prepared) if c != "\n" and (ord(c) < 32 or 0x7F <= ord(c) < 0xA0)]
    assert LaunchPlan.from_json(prepared.plan.to_json()) == prepared.plan


class TestWhatCannotBeADirective:
    @pytest.mark.parametrize("value", ["a b", "a\nb", "a'b", 'a"b', "a#b", "a\\b", "a\u202eb"])
    def test_is_never_written_as_one(self, value: str, tmp_path: Path, run_dir: Path) -> None:
        """Specs refuses such text; a plan that holds it all the same is no script."""
        plan = _prepared(tmp_path, _with_runtime(PLAIN_JOB, "docker", None), PLAIN_SITE, run_dir).plan
        with pytest.raises(ValueError, match="comment cannot be written as a directive"):
            batch_script(replace(plan, batch=(*plan.batch, Setting("comment", value, "job"))))
