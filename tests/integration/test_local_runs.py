"""Local runs from the job file to the end, and the verbs that look at them."""

from __future__ import annotations

import json
import subprocess
from hashlib import sha256

import pytest
from local_runs import ESCAPE_CODES, ONE_RANK, PATIENCE_S, ROWS, command_line, wait_for

GIT = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]


def git(folder, *words):
    subprocess.run([*GIT, "-C", str(folder), *words], check=True, capture_output=True)


def test_a_run_to_the_end_leaves_a_whole_record(runs):
    (runs.jobs / ".gitignore").write_text("*.secret\n")
    (runs.jobs / "committed.py").write_text("before = 1\n")
    (runs.jobs / "removed.py").write_text("")
    git(runs.jobs, "init")
    git(runs.jobs, "add", "--all")
    git(runs.jobs, "commit", "--message", "start")
    (runs.jobs / "committed.py").write_text("changed = 1\n")
    (runs.jobs / "removed.py").unlink()
    (runs.jobs / "untracked.py").write_text("new = 1\n")
    (runs.jobs / "token.secret").write_text("hidden\n")
    # named like modules of Python and of ours: the trainer must not import them
    for name in ("queue.py", "json.py", "cpm_cluster.py"):
        (runs.jobs / name).write_text("raise SystemExit('imported from the code of the user')\n")
    job = runs.job(samples={"prompts": ["the cat"], "max_tokens": 4}, training__eval_every=10)
    job.write_text("# as I wrote it: ä\n" + job.read_text().replace("rows.jsonl", "rows.jsonl\n  eval: rows.jsonl"))

    done = runs.submit(job)

    assert done.returncode == 0, done.stdout + done.stderr
    run = runs.newest()
    _check_output(done.stdout, run)
    _check_records(run, job)
    _check_logs(runs)
    code = {str(path.relative_to(run.folder / "code")) for path in (run.folder / "code").rglob("*") if path.is_file()}
    expected = {".gitignore", "committed.py", "untracked.py", "queue.py", "json.py", "cpm_cluster.py"}
    assert code == expected | {"rows.jsonl", job.name}
    assert run.text("code/committed.py") == "changed = 1\n"
    assert run.json("provenance.json")["code"]["changed"] is True
    assert len(run.json("provenance.json")["code"]["commit"]) == 40
    assert not run.processes()


def _check_output(output, run):
    """Lines for people, without escape codes: which run, where, the loss curve, samples, what next."""
    assert not ESCAPE_CODES.search(output) and "\r" not in output
    for expected in (
        f"{run.id}\n  {run.folder}\n",
        "  starting",
        "█",
        "prompt: the cat",
        "before:",
        "after 20 steps:",
        f"{run.id}: finished",
        "step 20/20",
        f"cpm logs {run.id}",
        f"tensorboard --logdir {run.folder / 'tb'}",
    ):
        assert expected in output


def _check_records(run, job):
    assert (run.folder / "job.yaml").read_bytes() == job.read_bytes()
    assert "tiny" in run.text("resolved.yaml")
    assert run.json("launch.json")["run_id"] == run.id
    assert run.json("provenance.json")["packages"]["torch"]
    phases = [e["phase"] for e in run.events() if e["kind"] == "phase"]
    assert phases[0] == "prepare" and phases[-2:] == ["training", "cleanup"]
    (exit_record,) = (json.loads(path.read_text()) for path in (run.folder / "exit").iterdir())
    assert (exit_record["exit_code"], exit_record["attempt"], exit_record["clean"]) == (0, 1, True)
    assert [row["step"] for row in run.lines("metrics.jsonl")] == list(range(1, 21))
    assert list((run.folder / "tb").glob("events.out.tfevents.*"))
    assert run.text("checkpoints/latest") == "step-00000020\n"
    assert list((run.folder / "weights").iterdir())
    for rank in (0, 1):
        assert f"rank {rank} of 2" in run.text(f"attempt-1/node-0/rank-{rank}.log")
    assert run.status()["state"] == "finished"
    assert not list(run.folder.rglob("*.tmp"))


def _check_logs(runs):
    assert "rank 0 of 2" in runs.cpm("logs").stdout
    assert "rank 1 of 2" in runs.cpm("logs", "--rank", "1").stdout
    assert "rank 0 of 2" not in runs.cpm("logs", "--launcher").stdout
    missing = runs.cpm("logs", "--rank", "5")
    assert missing.returncode == 2
    assert (
        "attempt 1" in missing.stderr and "has no rank-5.log, only node.log, rank-0.log, rank-1.log" in missing.stderr
    )
    assert "has no attempt 4, only 1" in runs.cpm("logs", "--attempt", "4").stderr


def test_json_is_the_only_output_of_a_run_that_is_followed_with_it(runs):
    done = runs.submit(runs.bash("echo noise; exit 7"), "--json")
    found = json.loads(done.stdout)
    assert (found["state"], found["exit_code"], found["verdict"]["category"]) == ("failed", 7, "program")
    assert found["run_dir"] == str(runs.newest().folder)
    assert done.returncode == 7


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137), ("kill -SEGV $$", 139)]
)
def test_the_exit_code_of_the_program_is_that_of_cpm_submit(runs, script, code):
    done = runs.submit(runs.bash(script))
    assert done.returncode == code
    assert runs.newest().status()["exit_code"] == code
    assert not runs.newest().processes()


def test_a_mistake_in_the_data_ends_with_2_and_one_sentence_that_names_the_line(runs):
    with (runs.jobs / "rows.jsonl").open("a") as rows:
        rows.write('{"input": "no output"}\n')
    done = runs.submit(runs.job())
    assert done.returncode == 2
    sentence = f'{runs.jobs / "rows.jsonl"}:{len(ROWS) + 1}: has no "output"'
    assert sentence in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    verdict = runs.newest().json("verdict.json")
    assert verdict["category"] == "user error" and sentence in verdict["cause"]


def test_a_learning_rate_that_is_too_high_is_a_diverged_training(runs):
    done = runs.submit(runs.job(training__lr=100, training__clip_grad_norm=0, training__steps=3000))
    assert done.returncode == 1
    assert "diverged" in done.stdout and "lower training.lr" in done.stdout
    assert runs.newest().status()["verdict"]["category"] == "diverged"


def test_the_verbs_find_a_run_by_its_id_by_the_beginning_of_it_and_the_newest(runs):
    first = runs.detached(runs.bash("echo from the first; exit 3", name="first"))
    second = runs.detached(runs.bash("echo from the second", name="second"))
    for run in (first, second):
        run.await_end()

    assert f"{second.id}: finished, exit code 0 (attempt 1)" in runs.cpm("status").stdout
    assert f"{first.id}: failed, exit code 3 (attempt 1)" in runs.cpm("status", "first").stdout
    assert "what to do:" in runs.cpm("status", first.id).stdout
    assert runs.cpm("status", first.folder).stdout == runs.cpm("status", first.id).stdout
    assert runs.cpm("logs").stdout == "from the second\n"
    assert runs.cpm("logs", "first").stdout == "from the first\n"

    lines = runs.cpm("runs").stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [[second.id, "finished"], [first.id, "failed"]]
    assert runs.cpm("runs", "--limit", "1").stdout.splitlines() == lines[:1]
    listed = json.loads(runs.cpm("runs", "--json").stdout)
    assert [(row["run"], row["state"], row["exit_code"]) for row in listed] == [
        (second.id, "finished", 0),
        (first.id, "failed", 3),
    ]
    assert listed[1]["verdict"]["category"] == "program"


def test_a_name_that_fits_several_runs_or_none(runs):
    for _ in range(2):
        runs.submit(runs.bash("true", name="twin"))
    several = runs.cpm("status", "twin")
    assert several.returncode == 2 and "the beginning of 2 runs" in several.stderr
    for verb in ("status", "logs", "cancel", "resume"):
        unknown = runs.cpm(verb, "nobody")
        assert unknown.returncode == 2 and "nobody is no run" in unknown.stderr
        assert runs.cpm(verb, "").returncode == 2


def test_verbs_without_any_runs(runs):
    for verb in ("status", "logs", "cancel", "resume"):
        done = runs.cpm(verb)
        assert done.returncode == 2
        assert "there are no runs" in done.stderr and "cpm-submit" in done.stderr
    assert json.loads(runs.cpm("status", "--json").stdout)["error"].startswith("there are no runs")
    listing = runs.cpm("runs")
    assert (listing.returncode, listing.stdout) == (0, "") and "no runs" in listing.stderr
    assert json.loads(runs.cpm("runs", "--json").stdout) == []


def test_logs_follow_a_run_to_its_end(runs):
    run = runs.detached(runs.bash("echo one; while [ ! -e go ]; do sleep 0.05; done; echo two"))
    follower = runs.open("logs", "--follow", run.id)
    run.await_log("one")
    (run.folder / "code" / "go").touch()
    assert follower.communicate(timeout=PATIENCE_S)[0] == "one\ntwo\n"
    assert follower.returncode == 0


def test_a_secret_reaches_the_program_and_nothing_else(runs):
    value = "s3cret,with=comma $HOME"
    secrets = runs.home / ".config/cpm-cluster/secrets.env"
    secrets.parent.mkdir(parents=True)
    secrets.write_text(f"OTHER=1\nTOKEN={value}\n")
    secrets.chmod(0o600)
    run = runs.detached(
        runs.python(
            """
            import hashlib, os, pathlib, time
            print(hashlib.sha256(os.environ["TOKEN"].encode()).hexdigest(), "OTHER" in os.environ, flush=True)
            while not pathlib.Path("go").exists():
                time.sleep(0.05)
            """,
            secrets=["TOKEN"],
        )
    )
    run.await_log("False")
    assert run.log.startswith(sha256(value.encode()).hexdigest())
    assert len(run.processes()) >= 3  # controller, guard and agent at least
    assert not [pid for pid in run.processes() if value in command_line(pid)]
    (run.folder / "code" / "go").touch()
    run.await_end()
    recorded = [path for path in run.folder.rglob("*") if path.is_file() and value.encode() in path.read_bytes()]
    assert not recorded
    assert "TOKEN" in run.text("launch.json")


def test_a_secrets_file_that_others_can_read_is_refused(runs):
    secrets = runs.home / ".config/cpm-cluster/secrets.env"
    secrets.parent.mkdir(parents=True)
    secrets.write_text("TOKEN=x\n")
    secrets.chmod(0o644)
    done = runs.submit(runs.bash("true", secrets=["TOKEN"]))
    assert done.returncode == 3
    assert "readable by others" in done.stdout and "chmod 600" in done.stdout


def test_two_runs_at_the_same_time_do_not_disturb_each_other(runs):
    one = runs.detached(runs.job("one", training__steps=100_000, resources=ONE_RANK))
    two = runs.detached(runs.job("two", training__steps=400, resources=ONE_RANK))
    one.await_step(1)
    two.await_step(1)
    done = runs.cpm("cancel", "one")
    assert f"{one.id}: cancelled" in done.stdout
    assert not one.processes()
    assert two.await_end()["state"] == "finished"
    assert [row["step"] for row in two.lines("metrics.jsonl")] == list(range(1, 401))
    assert one.status()["state"] == "cancelled"


def test_a_job_inside_another_job_does_not_take_over_its_place(runs):
    """As in a shell on the second node of an allocation, started by another launcher."""
    around = {"SLURM_NODEID": "1", "SLURM_JOB_ID": "77", "CPM_ATTEMPT": "9", "RANK": "3", "CPM_RUN_ID": "outer"}
    done = runs.submit(runs.bash('echo "$NODE_RANK,$CPM_ATTEMPT,$CPM_RUN_ID,${RANK-no rank}"'), env=around)
    assert done.returncode == 0
    run = runs.newest()
    assert run.log == f"0,1,{run.id},no rank\n"


def test_a_program_that_is_not_there(runs):
    done = runs.submit(runs.command("no-such-program", "x"))
    assert done.returncode == 3
    assert "no-such-program cannot be run on this node: No such file or directory" in done.stdout


def test_a_job_file_of_an_earlier_run_runs_again_with_that_runs_code(runs):
    (runs.jobs / "version").write_text("first\n")
    job = runs.bash("cat version")
    runs.submit(job)
    first = runs.newest()
    (runs.jobs / "version").write_text("second\n")
    runs.submit(first.folder / "job.yaml")
    assert runs.newest().id != first.id
    assert runs.newest().log == "first\n"


def test_a_user_who_looks_at_a_run_of_somebody_else(runs):
    """Nothing can be written there, as on a disk that is full: what happened can be read all the same."""
    run = runs.detached(runs.bash("exit 3"))
    wait_for("end", lambda: not run.processes() and run.folder.joinpath("exit").exists())
    (run.folder / "verdict.json").mkdir()
    done = runs.cpm("status")
    assert done.returncode == 0 and "failed, exit code 3" in done.stdout
