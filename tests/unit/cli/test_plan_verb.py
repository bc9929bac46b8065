"""cpm plan: the picture, JSON, suggestions, evaluation; and what cpm-submit makes of a job that does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cpm_cluster.cli import exit_codes
from cpm_cluster.cli.main import main, submit_main

JOBS = Path(__file__).resolve().parents[3] / "jobs"
TOO_LARGE = (str(JOBS / "full_100b.yaml"), "--set", "profile=lora-100b-8x80g")
ROWS = """\
id,model,params_b,hidden,layers,heads,kv_heads,ffn,vocab,gated_mlp,tied_embeddings,arch_kind,mode,lora_rank,\
lora_targets,trainable_params,engine,engine_version,zero_stage,offload_optimizer,offload_param,pin_memory,zero_init,\
bucket_elems,max_live_params,overlap_comm,precision,optimizer,micro_batch,grad_accum,seq_len,recompute,flash_attn,tp,\
pp,dp,n_gpus,n_nodes,gpu,gpu_mem_gb,memory_metric,outcome,gpu_mem_mb,gpu_censored,host_mem_gb,tokens_per_s_per_gpu,mfu,\
use_gpu,use_fit,use_host,use_time,source,note
mine,llama-7b,6.74,4096,32,32,32,11008,32000,1,0,decoder,full,,,,none,,,,,,,,,,bf16_pure,adamw,1,1,2048,full,1,1,1,1,1,\
1,A100,80,nvml,ok,60000,0,,3000,,1,1,0,1,me,
"""


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "CPM_RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *words: str, program=main) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        program(list(words))
    said = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.out, said.err


class TestPicture:
    def test_shows_where_the_bytes_go_with_formulas_verdicts_time_and_cost(self, capsys) -> None:
        code, text, _ = run(capsys, "plan", str(JOBS / "lora_100b.yaml"))
        assert code == exit_codes.OK
        assert re.search(r"^GPU memory +fits +[\d.]+ GiB \(.* to .*\) of 79.3 GiB for each GPU, end of the", text, re.M)
        assert re.search(r"^  A{5,}B{3,}C+.*·+$", text, re.M)
        assert re.search(r"^  A  weights +23.3 GiB  2N/8 \(bmtrain/\w+\.py\)", text, re.M)
        for word in ("host memory", "/dev/shm", "disk", "time", "MFU", "USD", "kWh", "not calibrated"):
            assert word in text
        assert re.search(r"^verdict +fits$", text, re.M)

    def test_marks_where_the_card_ends_and_proposes_what_would_fit(self, capsys) -> None:
        code, text, _ = run(capsys, "plan", *TOO_LARGE)
        assert code == exit_codes.DOES_NOT_FIT
        assert re.search(r"^  A+\|A+", text, re.M)
        assert "would fit: 32 GPUs instead of 8" in text
        assert "--set resources.nodes=4 --set training.grad_accum=1" in text

    @pytest.mark.parametrize("job", sorted(path.stem for path in JOBS.glob("*.yaml")))
    def test_of_every_packaged_job_has_no_escape_codes_in_a_pipe(self, capsys, job: str) -> None:
        code, text, errors = run(capsys, "plan", str(JOBS / f"{job}.yaml"))
        assert (code, errors) == (exit_codes.OK, "")
        assert "\x1b" not in text
        assert "does not fit" not in text and "tight" not in text

    def test_colours_are_for_terminals_and_no_color_takes_them_away(self, capsys, monkeypatch) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert "\x1b[" in run(capsys, "plan", str(JOBS / "full_10b.yaml"))[1]
        monkeypatch.setenv("NO_COLOR", "1")
        coloured = re.compile(r"\x1b\[[\d;]*3\d")
        assert not coloured.search(run(capsys, "plan", str(JOBS / "full_10b.yaml"))[1])

    def test_a_job_of_the_package_goes_by_its_name(self, capsys) -> None:
        assert run(capsys, "plan", "quickstart")[0] == exit_codes.OK


class TestJson:
    def test_holds_figures_verdicts_and_advice(self, capsys) -> None:
        code, text, _ = run(capsys, "plan", *TOO_LARGE, "--json")
        found = json.loads(text)
        assert (code, found["verdict"]) == (exit_codes.DOES_NOT_FIT, "does not fit")
        gpu = found["fit"][0]
        assert gpu["resource"] == "GPU memory"
        assert gpu["bytes"] == sum(part["bytes"] for part in gpu["components"])
        assert gpu["low_bytes"] < gpu["bytes"] < gpu["high_bytes"]
        assert found["time"]["seconds"] > 0 and found["cost"]["price_usd"]["value"] > 0
        assert found["advice"][0]["overrides"]

    def test_goes_to_a_file_too_and_never_over_a_job(self, capsys, tmp_path: Path) -> None:
        job = str(JOBS / "full_10b.yaml")
        assert run(capsys, "plan", job, "--json", "plan.json")[:2] == (exit_codes.OK, "")
        assert json.loads((tmp_path / "plan.json").read_text())["verdict"] == "fits"
        assert json.loads(run(capsys, "plan", "--json", job)[1])["verdict"] == "fits"
        (tmp_path / "mine.yaml").write_text("precious")
        assert run(capsys, "plan", "--json", "mine.yaml", job)[0] == exit_codes.BAD_INPUT
        assert (tmp_path / "mine.yaml").read_text() == "precious"


class TestCalibrate:
    def test_says_what_would_run(self, capsys) -> None:
        code, text, _ = run(capsys, "calibrate", str(JOBS / "full_10b.yaml"), "--dry-run")
        assert code == exit_codes.OK
        assert re.fullmatch(r"(\d+ of 32 layers, micro batch [12], 4096 tokens: \d+ steps\n){3}", text)

    def test_of_a_program_of_the_users_own_is_refused(self, capsys) -> None:
        code, _, errors = run(capsys, "calibrate", str(JOBS / "infer_10b.yaml"))
        assert code == exit_codes.BAD_INPUT
        assert "its program is its own" in errors


class TestSuggest:
    def test_prints_a_table_and_how_to_type_its_first_line(self, capsys) -> None:
        code, text, _ = run(capsys, "plan", str(JOBS / "full_10b.yaml"), "--suggest", "--objective", "gpus")
        assert code == exit_codes.OK
        assert re.search(r"configurations considered", text)
        assert re.search(r"^ *1 +\d+ × \d+ ", text, re.M)
        assert "the first: --set resources.nodes=1 --set resources.gpus_per_node=1" in text

    def test_speaks_json(self, capsys) -> None:
        words = ("plan", str(JOBS / "full_10b.yaml"), "--suggest", "--gpus", "16", "--json")
        options = json.loads(run(capsys, *words)[1])["options"]
        assert {option["gpus"] for option in options} == {16}

    def test_says_what_sizes_there_are(self, capsys) -> None:
        code, _, errors = run(capsys, "plan", str(JOBS / "full_10b.yaml"), "--suggest", "--gpus", "31")
        assert code == exit_codes.BAD_INPUT
        assert "31 GPUs" in errors and "24, 32" in errors


class TestEvaluate:
    def test_says_how_far_off_it_is_and_writes_every_prediction(self, capsys, tmp_path: Path) -> None:
        (tmp_path / "rows.csv").write_text(ROWS)
        code, text, _ = run(capsys, "plan", "--evaluate", "rows.csv", "--json", "out.json")
        assert code == exit_codes.OK
        assert re.search(r"^GPU memory +1 rows +mean absolute error +[\d.]+%", text, re.M)
        (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
        assert set(row) == {"id", "gpu_mem_mb", "host_mem_gb", "fits", "tokens_per_s_per_gpu", "low", "high"}
        assert row["id"] == "mine" and row["low"] < row["gpu_mem_mb"] < row["high"]

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            ("id,model\nx,y\n", "there is no column"),
            (ROWS.replace(",60000,", ",much,"), "gpu_mem_mb"),
            (ROWS.replace(",32,32,32,", ",0,32,32,"), ":2: layers: 0 is out of range"),
            (ROWS.replace(",32,32,32,", ",32,33,33,"), ":2: heads: 33 heads do not divide hidden 4096"),
        ],
    )
    def test_a_table_that_is_none_is_refused_with_its_place(self, capsys, tmp_path: Path, content, told) -> None:
        (tmp_path / "rows.csv").write_text(content)
        code, _, errors = run(capsys, "plan", "--evaluate", "rows.csv")
        assert code == exit_codes.BAD_INPUT
        assert "rows.csv:" in errors and told in errors and "Traceback" not in errors

    def test_one_that_is_not_there_too(self, capsys) -> None:
        code, _, errors = run(capsys, "plan", "--evaluate", "none.csv")
        assert code == exit_codes.UNAVAILABLE
        assert "none.csv" in errors


class TestSubmission:
    def test_of_a_job_that_does_not_fit_is_refused_with_what_would(self, capsys, tmp_path: Path) -> None:
        code, text, errors = run(capsys, *TOO_LARGE, "--export", "x.sbatch", program=submit_main)
        assert (code, text) == (exit_codes.DOES_NOT_FIT, "")
        for word in ("GPU memory", "79.3 GiB", "32 GPUs instead of 8", "--set resources.nodes=4", "--force"):
            assert word in errors
        assert list(tmp_path.iterdir()) == []

    def test_force_overrides_and_is_recorded(self, capsys, tmp_path: Path) -> None:
        words = (*TOO_LARGE, "--set", f"code={tmp_path}", "--export", "x.sbatch", "--force")
        code, _, errors = run(capsys, *words, program=submit_main)
        assert code == exit_codes.OK
        assert "submitted nevertheless (--force): GPU memory" in errors
        (run_dir,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
        assert json.loads((run_dir / "fit.json").read_text())["verdict"] == "does not fit"
        assert json.loads((run_dir / "provenance.json").read_text())["forced"][0].startswith("GPU memory")
        events = (run_dir / "events" / "submitter.jsonl").read_text()
        assert [json.loads(line)["kind"] for line in events.splitlines()] == ["created", "forced"]

    def test_the_head_of_every_submission_says_that_it_fits(self, capsys, tmp_path: Path) -> None:
        words = (str(JOBS / "full_10b.yaml"), "--set", f"code={tmp_path}", "--export", "x.sbatch")
        code, _, errors = run(capsys, *words, program=submit_main)
        assert code == exit_codes.OK
        assert re.search(r"^fits: GPU memory [\d.]+ GiB of 79.3 GiB, .*USD$", errors, re.M)
        (run_dir,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
        assert json.loads((run_dir / "provenance.json").read_text())["forced"] == []

    def test_of_a_program_that_is_not_described_nothing_is_said(self, capsys, tmp_path: Path) -> None:
        text = (JOBS / "infer_100b.yaml").read_text("utf-8")
        (tmp_path / "mine.yaml").write_text(re.sub(r"^workload:.*\n", "", text, flags=re.M), "utf-8")
        words = ("mine.yaml", "--set", f"code={tmp_path}", "--export", "x.sbatch")
        assert run(capsys, *words, program=submit_main)[::2] == (exit_codes.OK, "")

    def test_of_a_program_that_is_described_the_verdict_says_so(self, capsys, tmp_path: Path) -> None:
        words = (str(JOBS / "infer_100b.yaml"), "--set", f"code={tmp_path}", "--export", "x.sbatch")
        assert run(capsys, *words, program=submit_main)[2].startswith("fits, as workload describes it: GPU memory 2")

    def test_what_a_described_program_lacks_is_said_with_whose_word_it_is(self, capsys, tmp_path: Path) -> None:
        words = (str(JOBS / "infer_100b.yaml"), "--set", f"code={tmp_path}", "--set", "resources.gpus_per_node=1")
        code, _, errors = run(capsys, *words, program=submit_main)
        assert code == exit_codes.DOES_NOT_FIT
        assert "GPU memory: " in errors and "for each GPU of 79.3 GiB, decoding" in errors
        assert "as the job's workload describes its program" in errors
        assert "no three changes" not in errors

    def test_of_a_tight_job_is_warned_of(self, capsys, tmp_path: Path) -> None:
        tight = ("profile=minimal-train-10b", "training.offload_optimizer=true", f"code={tmp_path}")
        sets = [word for text in tight for word in ("--set", text)]
        words = (str(JOBS / "full_10b.yaml"), *sets, "--export", "x.sbatch")
        code, _, errors = run(capsys, *words, program=submit_main)
        assert code == exit_codes.OK
        assert "warning: tight: host memory" in errors

    def test_a_dry_run_says_it_with_its_exit_code(self, capsys) -> None:
        code, text, _ = run(capsys, *TOO_LARGE, "--dry-run", program=submit_main)
        assert code == exit_codes.DOES_NOT_FIT
        assert "GPU memory  does not fit" in text and "would fit: " in text
        found = json.loads(run(capsys, *TOO_LARGE, "--dry-run", "--json", program=submit_main)[1])
        assert found["verdict"] == "does not fit"
