"""runlog.py: what stands in the run folder."""

import json
import os
import subprocess
import time
from types import SimpleNamespace

import pytest

from runlog import RunError, RunLog, Stopwatch, Tracker, free_folder, git_commit, new_run


def test_every_record_is_one_line_whatever_it_holds(tmp_path):
    log = new_run(tmp_path / "run", config={"seed": 1}, device="cpu")
    record = {
        "text": 'a\nb\u2028c\x00"\ud800',
        "loss": float("nan"),
        "rewards": [float("inf"), 1.0],
    }
    log.write("samples", record)
    log.write("samples", {"step": 1})
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0]) == {**record, "loss": None, "rewards": [None, 1.0]}


def test_config_json_tells_how_the_run_was_made(tmp_path):
    new_run(tmp_path / "run", config={"seed": 1}, device="cpu").close()
    description = json.loads((tmp_path / "run" / "config.json").read_text())
    assert description["config"] == {"seed": 1}
    assert description["device"] == "cpu"
    assert {"python", "torch", "transformers"} <= description["versions"].keys()
    assert {"command", "git_commit", "started"} <= description.keys()


def test_the_commit_tells_whether_code_was_changed(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert git_commit(tmp_path / "nowhere") is None
    git("init")
    for name in ("code.py", "figure.png"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "figure.png").write_text("2")
    assert git_commit(tmp_path) == commit
    (tmp_path / "code.py").write_text("2")
    assert git_commit(tmp_path) == f"{commit}+changes"


def test_an_existing_run_is_never_written_to(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(RunError, match="exists"):
        new_run(tmp_path / "run", config={}, device="cpu")
    assert free_folder(tmp_path, "new") == tmp_path / "new"
    assert free_folder(tmp_path, "run") == tmp_path / "run-2"
    (tmp_path / "run-2").mkdir()
    assert free_folder(tmp_path, "run") == tmp_path / "run-3"


def test_only_one_process_writes_and_the_orphans_of_a_dead_one_are_waited_for(tmp_path):
    log = new_run(tmp_path / "run", config={}, device="cpu")
    with pytest.raises(RunError, match="another process is writing this run"):
        RunLog(tmp_path / "run")
    orphan = os.fork()  # as a loader's worker is made
    if orphan == 0:
        time.sleep(0.8)
        os._exit(0)
    log.close()
    RunLog(tmp_path / "run").close()
    os.waitpid(orphan, 0)


def test_laps_add_up_and_wait_for_the_device():
    waits = []
    watch = Stopwatch(lambda: waits.append(1))
    start = watch.last
    for phase in ("a_s", "b_s", "a_s"):
        watch.lap(phase)
    assert list(watch.seconds) == ["a_s", "b_s"]
    assert sum(watch.seconds.values()) == pytest.approx(watch.last - start)
    assert len(waits) == 3


def test_a_tool_that_fails_does_not_stop_the_run(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no network")

    log = new_run(tmp_path / "run", config={}, device="cpu")
    log.tracker = Tracker("tensorboard", tmp_path / "run", config={}, on_cpu=True)
    monkeypatch.setattr(log.tracker, "accelerator", SimpleNamespace(log=fail, end_training=fail))
    log.write("metrics", {"step": 0, "loss": 1.0})
    log.close()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {"step": 0, "loss": 1.0}
    told = capsys.readouterr().err
    assert "--report-to: step 0 is not shown: ConnectionError('no network')" in told
    assert "--report-to: may lack its end" in told


def test_a_tool_that_cannot_begin_is_told_in_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no account\nmore")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fail)
    with pytest.raises(RunError, match=r"^--report-to tensorboard: no account$"):
        Tracker("tensorboard", tmp_path, config={}, on_cpu=True)
