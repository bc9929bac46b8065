"""The BMTrain engine against the torch engine: the same losses, weights, keys and samples; and resuming."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import bmtrain_ranks
import bmtrain_shim
import pytest
import torch
from checkpoint_faults import Killed
from tiny_runs import TinyRun, paired

from cpm_cluster.training.engines.bmtrain_layers import Part
from cpm_cluster.training.engines.bmtrain_optimizer import PartOptimizer
from cpm_cluster.training.engines.bmtrain_versions import import_bmtrain, join
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.placement import Placement

OLD, NEW = bmtrain_shim.VERSIONS
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["project_q", "project_v", "w_out"]}
METHODS = {"full": {"kind": "full"}, "lora": LORA}
GENTLE = {"training.lr": 2e-3, "training.warmup_steps": 1}

# How far six losses (about 5.5 nats) may be from those of the torch engine in fp32 in one process.
TOLERANCE = {"fp32": 2e-6, "fp16": 4e-4, "bf16": 4e-3}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Return runs that several tests look at, made once for all of pytest-xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bmtrain"
    folder.mkdir(exist_ok=True)

    def take(world_size: int, changes: dict, train) -> TinyRun:
        name = hashlib.sha256(json.dumps([world_size, changes, *train.args], sort_keys=True).encode()).hexdigest()[:16]
        made = folder / f"{name}.pickle"
        with open(folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if made.exists():
                return pickle.loads(made.read_bytes())
            run = TinyRun(folder / name, {"expected_world_size": world_size, **GENTLE, **changes})
            assert train(run, world_size=world_size) == [0] * world_size
            made.write_bytes(pickle.dumps(run))
            return run

    return take


@pytest.fixture
def reference(shelf):
    """Return the torch engine's run with a method: fp32, one process, two micro batches a step."""
    return lambda method: shelf(
        1, {"method": METHODS[method], "training.grad_accum": 2}, partial(bmtrain_ranks.train_reference)
    )


@pytest.fixture
def trained(shelf):
    """Return a run on a version of BMTrain, by default in fp16 on two ranks."""

    def train(version: str, precision: str = "fp16", world_size: int = 2, **changes: object) -> TinyRun:
        bmtrain_shim.require(version)
        changes = {**_settings(world_size), "training.precision": precision, **changes}
        return shelf(world_size, changes, partial(bmtrain_ranks.train, version))

    return train


def _settings(world_size: int) -> dict:
    return {
        "engine": "bmtrain",
        "expected_world_size": world_size,
        "training.grad_accum": 2 // world_size,
        "training.zero_stage": 3,
        "training.recompute": "full",
        "training.eval_every": 0,
        "training.checkpoint.asynchronous": True,
        "samples.prompts": [],
    }


def _largest_difference(run: TinyRun, other: TinyRun) -> float:
    assert len(run.losses) == len(other.losses) == 6
    return max(abs(one - two) for one, two in paired(run.losses, other.losses))


def _assert_same_bits(run: TinyRun, other: TinyRun, weights: str = "weights/model.pt") -> None:
    assert run.losses == other.losses
    one, two = run.tensors(weights), other.tensors(weights)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("version", [OLD, NEW])
def test_in_fp32_two_ranks_compute_what_the_torch_engine_computes_in_one_process(trained, reference, version, method):
    shown = {"training.eval_every": 3, "samples.prompts": ["the cat"]}
    run, expected = trained(version, "fp32", method=METHODS[method], **shown), reference(method)
    assert _largest_difference(run, expected) < TOLERANCE["fp32"]
    for own, other in paired(run.lines("metrics.jsonl"), expected.lines("metrics.jsonl")):
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert own["tokens_seen"] == other["tokens_seen"]
        assert own["eval_loss"] == (other["eval_loss"] and pytest.approx(other["eval_loss"], abs=2e-6))
    assert run.lines("samples.jsonl") == expected.lines("samples.jsonl")
    file = "weights/model.pt" if method == "full" else "weights/delta.pt"
    own, other = run.tensors(file), expected.tensors(file)
    assert list(own) == list(other)
    assert all(torch.allclose(own[name], other[name], atol=1e-5) for name in own)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "version, precision, offload",
    [(OLD, "fp16", False), (OLD, "fp16", True), (NEW, "fp16", False), (NEW, "fp16", True), (NEW, "bf16", True)],
)
def test_in_half_precision_losses_stay_close_to_those_in_fp32(trained, reference, version, precision, offload, method):
    run = trained(version, precision, method=METHODS[method], **{"training.offload_optimizer": offload})
    assert _largest_difference(run, reference(method)) < TOLERANCE[precision]
    weights = run.tensors("weights/model.pt" if method == "full" else "weights/delta.pt")
    assert {weight.dtype for weight in weights.values()} == {
        getattr(torch, {"fp16": "half", "bf16": "bfloat16"}[precision])
    }


def test_the_number_of_ranks_does_not_matter(trained, reference):
    assert _largest_difference(trained(NEW, "bf16", world_size=1), reference("full")) < TOLERANCE["bf16"]
    assert _largest_difference(trained(NEW, "fp16", world_size=1), trained(NEW, "fp16")) < 2e-4


@pytest.mark.parametrize("version", [OLD, NEW])
def test_zero_2_and_zero_3_give_the_same_bits(trained, version):
    _assert_same_bits(trained(version), trained(version, **{"training.zero_stage": 2}))


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputation_gives_the_same_bits_with_dropout_too(trained, stage):
    changes = {"method": {**LORA, "dropout": 0.3}, "training.zero_stage": stage}
    runs = [trained(NEW, **changes, **{"training.recompute": recompute}) for recompute in ("full", "none")]
    _assert_same_bits(*runs, weights="weights/delta.pt")


def test_the_versions_give_the_same_bits(trained):
    _assert_same_bits(trained(OLD), trained(NEW))


def test_what_runs_is_said_once_and_so_is_recomputation_that_cannot_be_turned_off(trained):
    assert "BMTrain 1.0.1: ZeRO-3, fp16, bmtrain AdamOptimizer\n" in trained(NEW).log(0)
    log = trained(OLD, **{"training.recompute": "none"}).log(0)
    assert "BMTrain 0.2.3.post2: ZeRO-3, fp16, bmtrain AdamOptimizer; this version always recomputes" in log
    assert "ZeRO-3" not in trained(NEW).log(1)


def _resumed(run: TinyRun, version: str, tmp_path, world_size: int = 2, **changes: object) -> TinyRun:
    """Continue a finished run from its checkpoint after step 3, elsewhere."""
    directory = tmp_path / "resumed"
    resumed = TinyRun(directory, {})
    shutil.copytree(run.directory, directory, dirs_exist_ok=True)
    shutil.rmtree(directory / "checkpoints/step-00000006")
    resumed.raw = {**run.raw, "output_dir": str(directory)}
    for dotted, value in {**_settings(world_size), "training.zero_stage": 3, **changes}.items():
        resumed.change(dotted, value)
    assert bmtrain_ranks.train(version, resumed, world_size) == [0] * world_size
    assert "continuing after step 3" in resumed.log(0)
    return resumed


@pytest.mark.parametrize(
    "version, precision, method, offload",
    [
        (OLD, "fp16", "full", False),
        (NEW, "fp16", "lora", False),
        (NEW, "bf16", "full", True),
        (NEW, "fp32", "full", False),
    ],
)
def test_a_resumed_run_ends_with_the_bits_of_a_straight_one(trained, tmp_path, version, precision, method, offload):
    offloading = {"training.offload_optimizer": offload}
    straight = trained(version, precision, method=METHODS[method], **offloading)
    resumed = _resumed(straight, version, tmp_path, **offloading)
    _assert_same_bits(resumed, straight, "weights/model.pt" if method == "full" else "weights/delta.pt")


@pytest.mark.parametrize("version", [OLD, NEW])
def test_a_run_killed_while_it_saves_ends_with_the_bits_of_a_straight_one(trained, tiny_run, version):
    straight = trained(version)
    run = tiny_run(**_settings(2), **{"training.precision": "fp16"}, **GENTLE)
    for kill in (Killed(1, "sum", 1), Killed(0, "manifest", 2), Killed(0, "latest", 1)):
        assert bmtrain_ranks.train_until_killed(version, run, kill) == -signal.SIGKILL, (kill, run.log(kill.rank))
    assert bmtrain_ranks.train(version, run) == [0, 0], run.log()
    _assert_same_bits(run, straight)


def test_dropout_goes_on_where_it_was(trained, tmp_path):
    straight = trained(NEW, method={**LORA, "dropout": 0.3})
    _assert_same_bits(_resumed(straight, NEW, tmp_path), straight, "weights/delta.pt")


@pytest.mark.parametrize("version, before, after", [(OLD, 2, 1), (NEW, 2, 1), (OLD, 1, 2), (NEW, 1, 2)])
def test_a_run_continues_on_another_number_of_ranks(trained, tmp_path, version, before, after):
    straight = trained(version, world_size=before)
    assert _resumed(straight, version, tmp_path, after).losses == pytest.approx(straight.losses, abs=2e-4)


def test_parts_that_are_cut_at_other_places_come_together(trained, tmp_path):
    """Three ranks with two rows take what two ranks took with three, and most of their parts lie across the cut."""
    straight = trained(NEW, "fp32", **{"training.micro_batch": 3})
    resumed = _resumed(straight, NEW, tmp_path, 3, **{"training.micro_batch": 2, "training.grad_accum": 1})
    assert resumed.losses == pytest.approx(straight.losses, abs=2e-6)


def test_the_optimizer_can_move_to_the_host_and_back_between_attempts(trained, tmp_path):
    for number, offload in enumerate((True, False)):
        straight = trained(NEW, **{"training.offload_optimizer": not offload})
        resumed = _resumed(straight, NEW, tmp_path / str(number), **{"training.offload_optimizer": offload})
        assert resumed.losses == pytest.approx(straight.losses, abs=2e-4)


def test_a_run_continues_in_the_other_half_precision(trained, tmp_path):
    for before, after, scale in (("bf16", "fp16", 2.0**16), ("fp16", "bf16", 1.0)):
        straight = trained(NEW, before)
        resumed = _resumed(straight, NEW, tmp_path / after, **{"training.precision": after})
        assert resumed.losses == pytest.approx(straight.losses, abs=2 * TOLERANCE["bf16"])
        last = resumed.lines("metrics.jsonl")[-1]
        assert last["loss_scale"] == scale
        assert last["grad_norm"] == pytest.approx(straight.lines("metrics.jsonl")[-1]["grad_norm"], rel=0.05)


def test_a_run_continues_with_the_other_bmtrain(trained, tmp_path):
    _assert_same_bits(_resumed(trained(OLD), NEW, tmp_path), trained(OLD))


@pytest.mark.parametrize("version", [OLD, NEW])
def test_an_overflow_skips_the_step_and_halves_the_scale(tiny_run, version):
    bmtrain_shim.require(version)
    run = tiny_run(**_settings(2), **{"training.precision": "fp16"}, **GENTLE)
    assert bmtrain_ranks.train(version, run, first_loss_scale=2.0**20) == [0, 0]
    steps = run.lines("metrics.jsonl")
    overflows = [step["grad_norm"] is None for step in steps]
    assert overflows[0] and not overflows[-1]
    scales = [step["loss_scale"] for step in steps]
    assert scales == [2.0**20 / 2 ** sum(overflows[:number]) for number in range(6)]
    assert len({step["loss"] for step in steps}) > 1


def test_base_weights_reach_every_rank(tiny_run, reference, trained):
    bmtrain_shim.require(NEW)
    model = reference("full").directory / "weights/model.pt"
    run = tiny_run(init_from=str(model), method=LORA, **_settings(2), **GENTLE)
    assert bmtrain_ranks.train(NEW, run) == [0, 0]
    alone = {"expected_world_size": 1, "training.grad_accum": 2}
    expected = tiny_run("expected", init_from=str(model), method=LORA, **alone, **GENTLE)
    assert bmtrain_ranks.train_reference(expected) == [0]
    assert _largest_difference(run, expected) < TOLERANCE["fp32"]


def test_base_weights_that_do_not_fit_end_all_ranks_with_a_sentence(tiny_run, tmp_path):
    bmtrain_shim.require(NEW)
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    run = tiny_run(init_from=str(tmp_path / "other.pt"), **_settings(2))
    assert bmtrain_ranks.train(NEW, run) == [2, 2]
    assert "does not fit model cpm-test" in run.json("errors/rank-0.json")["message"]
    assert "rank 0 cannot use" in run.json("errors/rank-1.json")["message"]


@pytest.mark.parametrize(
    "version, changes, expected",
    [
        (OLD, {"training.precision": "bf16"}, "precision bf16 needs BMTrain 1.0, this is 0.2.3.post2; use fp16"),
        (NEW, {"training.offload_optimizer": True}, "BMTrain does it for fp16 and bf16"),
        (NEW, {"training.zero_stage": 0}, "BMTrain has 2 and 3, not 0"),
    ],
)
def test_what_bmtrain_cannot_do_is_said_before_training(tiny_run, version, changes, expected):
    bmtrain_shim.require(version)
    run = tiny_run(**{**_settings(1), **changes})
    assert bmtrain_ranks.train(version, run, 1) == [2]
    assert expected in run.json("errors/rank-0.json")["message"]


def test_without_a_gpu_the_engine_names_the_one_that_needs_none(tiny_run):
    run = tiny_run(**_settings(1))
    assert run.train(1) == [2]
    assert run.json("errors/rank-0.json")["message"] == (
        "engine bmtrain needs GPUs and torch sees none; on CPUs use engine torch"
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_the_ranks_parts_make_up_each_parameter(world_size):
    for shape, offset, total in [((5, 3), 0, 15), ((5, 3), 128, 256), ((2,), 0, 2)]:
        part = Part(torch.nn.Parameter(torch.empty(0)), torch.Size(shape), offset, total)
        held = [element for rank in range(world_size) for element in part.held_by(rank, world_size)]
        assert held == list(range(part.shape.numel()))


def test_a_state_from_before_the_first_update_has_no_moments(tiny_settings):
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = PartOptimizer(None, {"w": Part(parameter, torch.Size([2, 2]), 0, 4)}, tiny_settings().training)
    start = {name.rpartition("/")[2]: tensor.clone() for name, tensor in optimizer.state(loss_scale=1.0)}
    parameter.grad = torch.ones(4)
    optimizer.adam.step()
    optimizer.restore("w", start, loss_scale=1.0)
    assert parameter.tolist() == [1.0] * 4
    assert not optimizer.adam.state


@pytest.mark.parametrize("version", [OLD, NEW])
def test_a_run_of_one_process_takes_any_free_port_and_says_the_stage_where_it_is_asked_for(monkeypatch, version):
    for name, value in (("MASTER_ADDR", ""), ("MASTER_PORT", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    seen = []
    init = {
        OLD: lambda init_method="env://", seed=0, zero_level=3: seen.append((seed, zero_level)),
        NEW: lambda init_method="env://", seed=0, tp_size=1: seen.append((seed,)),
    }
    join(SimpleNamespace(init_distributed=init[version]), Placement(0, 1, 0), 7, 2)
    assert seen == [(7, 2) if version == OLD else (7,)]
    assert os.environ["MASTER_PORT"] == "0"


COMPILED = pytest.mark.skipif(
    not bmtrain_shim.is_installed(OLD),
    reason="BMTrain is not among Python's packages; `make test-python38` puts it there",
)


@COMPILED
def test_the_compiled_module_loads_without_a_gpu_once_nccl_is_found():
    code = (
        "from cpm_cluster.training.engines.bmtrain_versions import always_recomputes, import_bmtrain\n"
        "bmt = import_bmtrain()\n"
        "print(bmt.C.__file__, always_recomputes(bmt))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bmtrain/C.cpython-" in done.stdout and done.stdout.endswith(" True\n")


@COMPILED
def test_its_adam_for_cpus_computes_what_the_tests_put_in_its_place():
    torch.manual_seed(0)
    masters, gradients = torch.randn(1000), torch.randn(1000).half()
    results = []
    for launch in (import_bmtrain().C.adam_cpu_launcher, partial(bmtrain_shim.adam_on_cpu, torch.float16)):
        tensors = [masters.clone(), masters.half(), gradients, torch.zeros(1000), torch.zeros(1000)]
        for step in (1, 2, 3):
            launch(
                1000,
                *(tensor.data_ptr() for tensor in tensors),
                0.9,
                0.95,
                1e-8,
                1e-2,
                4.0,
                0.1,
                1 - 0.9**step,
                1 - 0.95**step,
            )
        results.append(tensors)
    for compiled, ours in paired(*results):
        assert torch.allclose(compiled.float(), ours.float(), rtol=1e-5, atol=1e-6)


def test_without_bmtrain_the_user_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "bmtrain", None)
    with pytest.raises(UserError, match="BMTrain is not installed here; name an image that has it"):
        import_bmtrain()


def test_a_bmtrain_without_nccl_is_told_apart_from_none(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "bmtrain", raising=False)
    (tmp_path / "bmtrain.py").write_text("raise ImportError('libnccl.so.2: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded .libnccl.so.2: cannot open.*needs libnccl.so.2 and a CUDA"):
        import_bmtrain()
