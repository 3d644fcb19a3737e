"""runlog.py: the content of the run folder."""

import json
import os
import shlex
import subprocess
import time
from threading import Barrier, Thread
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.runlog import (
    RunError,
    RunLog,
    Tracker,
    create_run,
    git_commit,
    numbered_folders,
    reopen_run,
)


def test_every_record_is_one_line_whatever_it_holds(tmp_path):
    log = create_run([tmp_path / "run"], config={"seed": 1}, device="cpu")
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
    create_run([tmp_path / "run"], config={"seed": 1}, device="cpu").close()
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
    with pytest.raises(RunError, match="run: exists; runs are never overwritten"):
        create_run([tmp_path / "run"], config={}, device="cpu")
    for number in (2, 3):
        log = create_run(numbered_folders(tmp_path, "run"), config={}, device="cpu")
        assert log.folder == tmp_path / f"run-{number}"
        log.close()


def test_runs_that_begin_together_each_get_a_folder(tmp_path):
    """All look before any creates a folder."""
    looked, folders = Barrier(4), []

    def begin():
        candidates = [tmp_path / f"run-{number}" for number in range(4)]
        looked.wait()
        log = create_run(candidates, config={}, device="cpu")
        log.close()
        folders.append(log.folder.name)

    threads = [Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(folders) == ["run-0", "run-1", "run-2", "run-3"]


def test_only_one_process_writes_and_the_orphans_of_a_dead_one_are_waited_for(tmp_path):
    log = create_run([tmp_path / "run"], config={}, device="cpu")
    with pytest.raises(RunError, match="another process is writing this run"):
        RunLog(tmp_path / "run")
    orphan = os.fork()  # as the loader starts its workers
    if orphan == 0:
        time.sleep(0.8)
        os._exit(0)
    log.close()
    RunLog(tmp_path / "run").close()
    os.waitpid(orphan, 0)


def test_a_tool_that_fails_does_not_stop_the_run(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no network")

    log = create_run([tmp_path / "run"], config={}, device="cpu")
    log.tracker = Tracker("tensorboard", tmp_path / "run", config={}, on_cpu=True)
    monkeypatch.setattr(log.tracker, "accelerator", SimpleNamespace(log=fail, end_training=fail))
    log.write("metrics", {"step": 0, "loss": 1.0})
    log.close()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {"step": 0, "loss": 1.0}
    told = capsys.readouterr().err
    assert (
        "--report-to: the numbers after 1 steps have not been logged: ConnectionError('no network')"
        in told
    )
    assert "--report-to: the last numbers may be missing" in told


def test_a_resumed_run_stands_once_in_tensorboard(tmp_path):
    """Killed after 3 steps, resumed after 2: no point appears twice, and no second run."""
    options = {"config": {"seed": 0}, "on_cpu": True}
    run = tmp_path / "run"
    log = create_run([run], config={}, device="cpu")
    log.tracker = Tracker("tensorboard", run, **options)
    for step in range(3):
        log.write("metrics", {"step": step, "loss": 1.0})
        log.write("evaluations", {"steps_done": step + 1, "loss": 1.0})
    log.close()
    before = sorted(path.name for path in (run / "tensorboard").iterdir() if path.is_dir())
    log = reopen_run(run, config={}, device="cpu", steps_done=2)
    log.tracker = Tracker("tensorboard", run, **options, resumed_at=2)
    for step in range(2, 4):
        log.write("metrics", {"step": step, "loss": 2.0})
        log.write("evaluations", {"steps_done": step + 1, "loss": 2.0})
    log.close()
    shown = EventAccumulator(str(run / "tensorboard")).Reload()
    for key in ("loss", "held_out/loss"):
        points = [(point.step, point.value) for point in shown.Scalars(key)]
        assert points == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert sorted(p.name for p in (run / "tensorboard").iterdir() if p.is_dir()) == before


def test_code_that_another_repository_does_not_track_has_no_commit(tmp_path):
    """For example a copy of the code in a home folder that is itself a repository."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "notes.txt").write_text("1")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "main.py").write_text("1")
    for command in (["init"], ["add", "notes.txt"], ["commit", "-m", "notes"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    assert git_commit(copy) is None


def test_a_command_is_written_as_a_shell_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py", "--name", "my run", "--runs", "$HOME"])
    create_run([tmp_path / "run"], config={}, device="cpu").close()
    command = json.loads((tmp_path / "run" / "config.json").read_text())["command"]
    assert shlex.split(command) == ["python", "main.py", "--name", "my run", "--runs", "$HOME"]


def test_a_tool_that_cannot_begin_is_told_in_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no account\nmore")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fail)
    with pytest.raises(RunError, match=r"^--report-to tensorboard: no account$"):
        Tracker("tensorboard", tmp_path, config={}, on_cpu=True)
