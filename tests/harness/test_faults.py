"""Whole runs that die, stop or are damaged: what they leave behind, and how they resume.

These tests simulate a death in this process, without any cleanup, as after SIGKILL.
`benchmarks/faults.py` kills real processes, a hundred times, at random moments.
"""

import dataclasses
import gc
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from itertools import count
from pathlib import Path

import optimi
import pytest
import torch
from conftest import TINY, config_of

import evaluate
import grpo
import main
from config import workload_of
from harness import checkpoint, runs
from harness.memory import disk_needs
from harness.runlog import RunError, RunLog, create_run

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # last: it has a memory.py of its own

import faults  # noqa: E402

FLAGS = "--preset tiny --device cpu --steps 5 --prompts-per-step 2 --group-size 2 --image-size 84"
FLAGS += " --save-every 2 --eval-every 2 --eval-examples 2 --sample-every 1"
FLAGS += " --sync-reference-every 2 --decay-steps 0"
ALL_LINES = {"metrics": 5, "evaluations": 4, "samples": 5}


class Killed(BaseException):
    """The simulated death of the process."""


def start(runs: Path, name: str, *flags: str) -> Path:
    main.main([*FLAGS.split(), "--runs", str(runs), "--name", name, *flags])
    return runs / name


def resume(run: Path, *flags: str) -> None:
    gc.collect()  # closes the files of a dead run
    main.main(["--resume", str(run), *flags])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, *arguments: str) -> str:
    """Return the line that refuses a command line; there must be only one."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.main(list(arguments))
    lines = capsys.readouterr().err.splitlines()  # includes progress bars
    errors = [line for line in lines if line.strip() and "Loading weights" not in line]
    assert stop.value.code == 2
    assert len(errors) == 1
    return errors[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run without any fault."""
    run = start(tmp_path_factory.mktemp("runs"), "whole")
    assert {name: len(lines) for name, lines in faults.curves(run).items()} == ALL_LINES
    return run


# --- death --------------------------------------------------------------------------------


def kill_at_call(monkeypatch, owner, name: str, number: int) -> None:
    """Let the process die at the start of call `number`, counted from 1."""
    function, calls = getattr(owner, name), count(1)

    def dying(*arguments, **options):
        if next(calls) == number:
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # no cleanup
            raise Killed
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize(
    ("owner", "name", "call", "goes_on_after"),
    [
        (main, "take_step", 1, 0),
        (main, "log_step", 2, 0),  # before the first checkpoint
        (main, "take_step", 4, 2),
        (main, "log_step", 4, 2),  # the fourth step is done, its line is missing
        (main, "evaluate_and_log", 3, 2),  # the fourth step's line is written
        (checkpoint, "save_policy", 2, 2),  # in the second checkpoint, before the policy
        (checkpoint, "save_weights", 2, 2),  # before the reference
        (torch, "save", 2, 2),  # before the optimizer
        (checkpoint, "flush", 20, 2),  # all is written, but perhaps not flushed
        (checkpoint, "discard", 1, 4),  # the second is complete, the first still exists
        (checkpoint, "save_final", 1, 5),
    ],
)
def test_wherever_it_dies_a_run_goes_on_bit_for_bit(
    whole, tmp_path, monkeypatch, capsys, owner, name, call, goes_on_after
):
    kill_at_call(monkeypatch, owner, name, call)
    with pytest.raises(Killed):
        start(tmp_path, "killed")
    monkeypatch.undo()
    resume(tmp_path / "killed")
    assert f"resuming after {goes_on_after} steps" in capsys.readouterr().out
    assert faults.is_same(tmp_path / "killed", whole)
    left = {path.name for path in (tmp_path / "killed").glob("**/.*")}
    assert left == set()


def test_a_line_that_was_being_written_is_written_anew(whole, tmp_path, monkeypatch):
    kill_at_call(monkeypatch, main, "take_step", 4)
    with pytest.raises(Killed):
        start(tmp_path, "killed")
    monkeypatch.undo()
    for name in faults.LOGS:
        path = tmp_path / "killed" / f"{name}.jsonl"
        path.write_bytes(path.read_bytes() + b'{"step": 3, "rew')
    resume(tmp_path / "killed")
    assert faults.is_same(tmp_path / "killed", whole)


def test_a_real_process_that_is_killed(whole, tmp_path):
    flags = [*FLAGS.split(), "--runs", str(tmp_path), "--name", "killed", "--workers", "1"]
    command = [sys.executable, str(ROOT / "main.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while faults.lines_of(tmp_path / "killed") < 3 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    resume(tmp_path / "killed", "--workers", "0")
    assert faults.is_same(tmp_path / "killed", whole)


# --- stopping -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory) -> Path:
    """A run that received SIGTERM in its third step."""
    runs, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    update, calls = main.update, count(1)

    def interrupted(*arguments, **options):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return update(*arguments, **options)

    patch.setattr(main, "update", interrupted)
    with pytest.raises(SystemExit) as stop:
        start(runs, "stopped")
    patch.undo()
    assert stop.value.code == 128 + signal.SIGTERM
    return runs / "stopped"


def test_a_signal_lets_the_step_finish_and_saves_it(stopped):
    assert [path.name for path in checkpoint.checkpoints_of(stopped)] == ["step-000003"]
    assert faults.lines_of(stopped) == 3
    assert not (stopped / "final").exists()


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_stopped_run_goes_on_bit_for_bit(whole, stopped, tmp_path):
    run = copy_of(stopped, tmp_path)
    resume(run)
    assert faults.is_same(run, whole)
    description = json.loads((run / "config.json").read_text())
    assert [entry["steps_done"] for entry in description["resumed"]] == [3]
    assert description["config"] == json.loads((whole / "config.json").read_text())["config"] | {
        "runs": description["config"]["runs"],
        "name": "stopped",
    }


def test_steps_may_grow(whole, stopped, tmp_path):
    longer = start(tmp_path, "longer", "--steps", "7")
    run = copy_of(whole, tmp_path)
    resume(run, "--steps", "7", "--keep", "3")
    assert faults.curves(run)["metrics"] == faults.curves(longer)["metrics"]
    assert json.loads((run / "config.json").read_text())["config"]["steps"] == 7
    names = [path.name for path in checkpoint.checkpoints_of(run)]
    assert names == ["step-000005", "step-000006", "step-000007"]


def test_a_run_without_its_end_is_evaluated_at_its_newest_checkpoint(stopped, tmp_path, capsys):
    evaluate.main([str(stopped), "--examples", "2", "--plot", str(tmp_path / "plot.png")])
    assert "all " in capsys.readouterr().out


# --- final/ of an earlier end, and folders that move ----------------------------------------


def test_after_a_resume_the_weights_of_most_steps_are_evaluated(whole, tmp_path, capsys):
    """final/ stays from the run's first end until the run ends again."""
    run = copy_of(whole, tmp_path)
    kill = pytest.MonkeyPatch()
    kill_at_call(kill, main, "take_step", 3)
    with pytest.raises(Killed):
        resume(run, "--steps", "9")
    kill.undo()
    gc.collect()
    assert f"{run / 'final'}: is from an earlier step" in capsys.readouterr().out
    numbers = tmp_path / "numbers.json"
    flags = ["--examples", "2", "--json", str(numbers), "--plot", str(tmp_path / "x.png")]
    for target, weights, steps_done in (
        (run, "checkpoints/step-000006", 6),
        (run / "final", "final", 5),
    ):
        evaluate.main([str(target), *flags])
        found = json.loads(numbers.read_text())
        assert (found["weights"], found["steps_done"]) == (str(run / weights), steps_done)
        assert f"{run / weights}, after {steps_done} steps" in capsys.readouterr().out
    resume(run, "--steps", "6")  # no step is left: only final/ is saved again
    assert checkpoint.steps_of(run / "final") == 6
    assert "6 steps are done" in refused(capsys, "--resume", str(run), "--steps", "6")


def test_a_run_goes_on_after_its_checkout_has_moved(tmp_path, capsys):
    """First the model moves with the run, then alone, and another one is offered instead."""
    before = tmp_path / "before"
    shutil.copytree(TINY, before / "tiny")
    flags = ["--model", str(before / "tiny"), "--sync-reference-every", "0", "--steps", "1"]
    start(before / "runs", "run", *flags)
    now = before.rename(tmp_path / "now")
    run = now / "runs" / "run"
    resume(run, "--steps", "2")
    assert json.loads((run / "config.json").read_text())["config"]["model"] == str(now / "tiny")
    (now / "tiny").rename(now / "elsewhere")
    told = refused(capsys, "--resume", str(run), "--steps", "3")
    assert f"its model folder {now / 'tiny'} does not exist" in told
    assert "--model FOLDER" in told
    shutil.copytree(now / "elsewhere", now / "other")
    template = now / "other" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    told = refused(capsys, "--resume", str(run), "--steps", "3", "--model", str(now / "other"))
    assert "this run started from: the checksum of the files does not match" in told
    resume(run, "--steps", "3", "--model", str(now / "elsewhere"))
    assert faults.lines_of(run) == 3


def test_without_a_checkpoint_another_model_is_refused(whole, tmp_path, capsys):
    run = copy_of(whole, tmp_path)
    shutil.rmtree(run / "checkpoints")
    told = refused(capsys, "--resume", str(run), "--model", str(whole / "final"))
    assert f"--model {whole / 'final'}: the run started from {TINY}, and has no" in told


def test_a_model_given_by_a_relative_path_is_found_from_anywhere(tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    start(tmp_path, "run", "--model", "mine", "--steps", "1")
    monkeypatch.chdir("/")
    resume(tmp_path / "run", "--steps", "2")


def test_a_start_that_fails_leaves_nothing(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RunError("--report-to tensorboard: no account")

    monkeypatch.setattr(runs, "Tracker", fail)
    flags = [*FLAGS.split(), "--runs", str(tmp_path), "--report-to", "tensorboard"]
    for name in ([], ["--name", "named"]):
        assert "no account" in refused(capsys, *flags, *name)
    assert not list(tmp_path.iterdir())


def test_a_folder_named_like_a_package_is_none(tmp_path, monkeypatch):
    """wandb creates a folder wandb/ in the working folder."""
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="--report-to trackio: needs its package"):
        config_of("--report-to", "trackio")


# --- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--lr 1e-3", "--lr 0.001: the run has 8e-05, and would become a different run"),
        ("--seed 1", "--seed 1: the run has 0"),
        ("--preset tiny", "--preset tiny: a resumed run keeps its own flags"),
        ("--steps 2", "3 steps are done; --steps 2 must be larger"),
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--rotate", "--rotate True: the run has False"),
        ("--name other", "--name other: the run has stopped"),
        ("--model /no/where", "model /no/where: no such folder"),
    ],
)
def test_flags_that_would_make_it_another_run(stopped, capsys, flags, told):
    before = tree(stopped)
    assert told in refused(capsys, "--resume", str(stopped), *flags.split())
    assert tree(stopped) == before


def test_a_run_that_is_done(whole, capsys):
    assert "5 steps are done" in refused(capsys, "--resume", str(whole))


def test_no_more_steps_are_proposed_to_a_run_whose_rate_has_ended(whole, tmp_path, capsys):
    """More steps would be refused, because the learning rate depends on their number."""
    run = tmp_path / "decayed"
    shutil.copytree(whole, run)
    described = json.loads((run / "config.json").read_text())
    described["config"]["decay_steps"] = 2
    (run / "config.json").write_text(json.dumps(described))
    told = refused(capsys, "--resume", str(run))
    assert "5 steps are done, and the learning rate has ended (--decay-steps 2)" in told
    assert told.endswith(f"start from its weights: --model {run}/final")
    (run / "final" / "adapter_config.json").write_text("{}")
    merging = f"its weights: --resume {run} --merge, then --model {run}/final"
    assert refused(capsys, "--resume", str(run)).endswith(merging)


def test_a_checkpoint_is_not_a_run(whole, capsys):
    for part in (newest_of(whole), whole / "final"):
        assert "is only part of a run; must be the run's" in refused(capsys, "--resume", str(part))


def test_what_to_type_is_written_as_a_shell_reads_it(tmp_path):
    assert f"--resume '{tmp_path}/my run'" in runs.how_to_resume(tmp_path / "my run")


def edit_config(run: Path, **changes) -> None:
    path = run / "config.json"
    description = json.loads(path.read_text())
    description["config"] |= changes
    path.write_text(json.dumps(description))


def edit_line(run: Path, number: int, text: str) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[number] = text
    path.write_text("\n".join(lines) + "\n")


def newest_of(run: Path) -> Path:
    return checkpoint.checkpoints_of(run)[-1]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda run: (run / "config.json").unlink(), "not a run folder"),
        (lambda run: (run / "config.json").write_text('{"config": '), "config.json"),
        (lambda run: (run / "config.json").write_text("[1]"), "config.json"),
        (lambda run: (run / "config.json").write_bytes(b"\xff\xfe"), "config.json"),
        (lambda run: edit_config(run, steps="many"), "steps must be of type int, not 'many'"),
        (lambda run: edit_config(run, beta=-1.0), "--beta -1.0: must be at least 0"),
        (lambda run: edit_config(run, loss="ppo"), "--loss ppo: must be one of"),
        (lambda run: edit_config(run, future=1), "future is not an option of this version"),
        (lambda run: edit_line(run, 1, "{"), "metrics.jsonl: line 2 is damaged"),
        (lambda run: edit_line(run, 1, "{}"), "metrics.jsonl: line 2 is damaged"),
        (lambda run: edit_line(run, 1, '{"step": 0}'), "does not contain the 3 steps"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "does not contain the 3 steps"),
        (lambda run: (newest_of(run) / "state.json").write_text("?"), "state.json: damaged"),
        (lambda run: (newest_of(run) / "optimizer.pt").unlink(), "no optimizer state"),
        (lambda run: (newest_of(run) / "optimizer.pt").write_bytes(b"?"), "damaged"),
        (lambda run: (newest_of(run) / "model.safetensors").write_bytes(b"?"), "damaged"),
    ],
)
def test_damage_is_told_in_one_line_and_nothing_is_touched(stopped, tmp_path, capsys, damage, told):
    run = copy_of(stopped, tmp_path)
    damage(run)
    before = tree(run)
    assert told in refused(capsys, "--resume", str(run))
    assert tree(run) == before


def test_another_model_in_the_folder_of_the_first(whole, tmp_path, capsys):
    """A fixed reference is not saved: it must be the one that the run had."""
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    run = start(tmp_path, "some", "--model", str(model), "--sync-reference-every", "0")
    shutil.copy(whole / "final" / "model.safetensors", model / "model.safetensors")
    told = refused(capsys, "--resume", str(run), "--steps", "6")
    assert "not the model that this run started from" in told


def test_a_run_that_another_process_writes(stopped, tmp_path, capsys):
    run = copy_of(stopped, tmp_path)
    log = RunLog(run)
    assert "another process is writing this run" in refused(capsys, "--resume", str(run))
    log.close()


def test_a_folder_that_cannot_be_made(tmp_path, file_size_limit):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be created"):
        create_run([tmp_path / "file" / "run"], config={}, device="cpu")
    with file_size_limit(10), pytest.raises(RunError, match="cannot be created"):
        create_run([tmp_path / "run"], config={}, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- full disks ---------------------------------------------------------------------------


def test_lines_wait_in_memory_while_the_disk_is_full(tmp_path, file_size_limit, capsys):
    log = create_run([tmp_path / "run"], config={}, device="cpu")
    path = tmp_path / "run" / "metrics.jsonl"
    log.write("metrics", {"step": 0})
    with file_size_limit(path.stat().st_size + 5):
        log.write("metrics", {"step": 1})
        log.write("metrics", {"step": 2})
        assert path.read_text() == '{"step": 0}\n{"ste'
        with pytest.raises(OSError, match="too large"):
            log.sync()  # so no checkpoint is saved
    assert "log lines wait in memory" in capsys.readouterr().err
    log.write("metrics", {"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_a_run_goes_on_without_the_checkpoints_that_do_not_fit(
    whole, tmp_path, capsys, file_size_limit
):
    with file_size_limit(20_000_000):  # the optimizer's moments need more
        run = start(tmp_path, "full")
    assert capsys.readouterr().out.count("no checkpoint was saved") == 3
    assert list((run / "checkpoints").iterdir()) == []
    assert faults.is_same(run, whole)


def disk_of(config, place: Path):
    return disk_needs(workload_of(config), place, **config.disk_options)


def test_too_little_room_is_told_at_the_start(tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 90 * 2**20))
    config = config_of(*FLAGS.split(), "--keep", "1")
    needs = disk_of(config, tmp_path / "run")
    assert needs.has_room is False  # 2 x 62.8 MiB, each with a reference, and 15.7 MiB
    assert str(needs).startswith(
        "Disk: 0.06 GiB per checkpoint, up to 2 at once, and 0.02 GiB for final/; 0.09 GiB are free"
    )
    smaller = dataclasses.replace(config, save_optimizer=False)
    assert disk_of(smaller, tmp_path / "run").has_room is True
    start(tmp_path, "full", "--steps", "3", "--eval-every", "0")
    assert "Checkpoints that do not fit are skipped" in capsys.readouterr().out


def test_a_dry_run_shows_what_it_takes_and_leaves_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        start(tmp_path, "dry", "--dry-run")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "It fits." in text
    assert "per checkpoint" in text
    assert not list(tmp_path.iterdir())
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as stop:
            main.main(["--dry-run"])
        assert stop.value.code == 2
        assert "needs a CUDA GPU with 104 GiB free" in capsys.readouterr().out


# --- numbers and memory -------------------------------------------------------------------


def test_a_run_whose_numbers_go_wrong_stops_before_its_last_good_checkpoint_goes(
    tmp_path, monkeypatch, capsys
):
    def spoiled(config, examples, text, prompt_index):
        reward = judge(config, examples, text, prompt_index)
        sound = examples[0].index < 4  # two steps
        return reward if sound else dataclasses.replace(reward, area_correctness=float("nan"))

    judge = main.judge
    monkeypatch.setattr(main, "judge", spoiled)
    with pytest.raises(SystemExit) as stop:
        start(tmp_path, "spoiled", "--steps", "9", "--eval-every", "0")
    assert "reward not finite in 5 steps in a row" in stop.value.code
    assert "step 3: skipped, not finite: reward" in capsys.readouterr().out
    run = tmp_path / "spoiled"
    assert f"Last checkpoint: {run / 'checkpoints' / 'step-000002'}" in stop.value.code
    lines = faults.curves(run)["metrics"]
    assert [line["not_finite"] for line in lines] == ["", "", *["reward"] * 5]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1, 1]
    assert lines[2]["reward_mean"] is None


def test_a_run_that_ends_in_skipped_steps_has_no_final_model(tmp_path, monkeypatch, capsys):
    def spoiled(config, examples, text, prompt_index):
        reward = judge(config, examples, text, prompt_index)
        sound = examples[0].index < 6  # three steps of five
        return reward if sound else dataclasses.replace(reward, area_correctness=float("nan"))

    judge = main.judge
    monkeypatch.setattr(main, "judge", spoiled)
    with pytest.raises(SystemExit) as stop:
        start(tmp_path, "spoiled")
    assert "the last step was skipped (reward not finite)" in stop.value.code
    saved = checkpoint.checkpoints_of(tmp_path / "spoiled")
    assert [path.name for path in saved] == ["step-000002", "step-000005"]  # both are kept
    assert stop.value.code.endswith(f"Last checkpoint: {saved[-1]}")
    assert not (tmp_path / "spoiled" / "final").exists()
    assert "done" not in capsys.readouterr().out


def test_ctrl_c_in_a_skipped_step_saves_it_beside_the_last_good_one(tmp_path, monkeypatch):
    def interrupted(config, examples, text, prompt_index):
        reward = judge(config, examples, text, prompt_index)
        if examples[0].index < 4:
            return reward
        if not stopped:
            stopped.append(signal.raise_signal(signal.SIGTERM))
        return dataclasses.replace(reward, area_correctness=float("nan"))

    judge, stopped = main.judge, []
    monkeypatch.setattr(main, "judge", interrupted)
    with pytest.raises(SystemExit) as stop:
        start(tmp_path, "spoiled")
    assert stop.value.code == 128 + signal.SIGTERM
    saved = [path.name for path in checkpoint.checkpoints_of(tmp_path / "spoiled")]
    assert saved == ["step-000002", "step-000003"]


def test_a_save_that_falls_on_a_skipped_step_is_made_up_for(tmp_path, monkeypatch):
    def spoiled(config, examples, text, prompt_index):
        reward = judge(config, examples, text, prompt_index)
        sound = examples[0].index != 2  # a save is due after the second step
        return reward if sound else dataclasses.replace(reward, area_correctness=float("inf"))

    judge = main.judge
    monkeypatch.setattr(main, "judge", spoiled)
    run = start(tmp_path, "spoiled", "--steps", "5", "--keep", "9")
    assert [path.name for path in checkpoint.checkpoints_of(run)] == [
        "step-000003",
        "step-000004",
        "step-000005",
    ]


def test_memory_that_runs_out_once_and_again(tmp_path, monkeypatch):
    scoring, calls = grpo.completion_logprobs, count(1)

    def failing(*arguments, **options):
        if next(calls) in (5, 15):  # of the policy in step 2, of the reference in step 4
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scoring(*arguments, **options)

    monkeypatch.setattr(grpo, "completion_logprobs", failing)
    told = pytest.warns(UserWarning, match="out of memory: retrying, .* --micro-batch 1 and")
    with told, pytest.raises(SystemExit) as stop:
        start(tmp_path, "full", "--micro-batch", "2")
    assert re.search(r"out of GPU memory\. Flags that save a tenth: --[a-z-]+ \w+", stop.value.code)
    lines = faults.curves(tmp_path / "full")["metrics"]
    assert [line["micro_batch"] for line in lines] == [2, 1, 1]


@pytest.mark.parametrize(
    ("owner", "name"), [(main, "collect_rollout"), (optimi.AdamW, "step"), (main, "evaluate")]
)
def test_memory_that_runs_out_where_no_smaller_pass_helps(tmp_path, monkeypatch, owner, name):
    """In sampling, the optimizer or an evaluation: one line reports it and names useful flags."""

    def failing(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(SystemExit) as stop:
        start(tmp_path, "full")
    assert re.search(r"out of GPU memory\. Flags that save a tenth: --[a-z-]+ \w+", stop.value.code)
    assert "--micro-batch" not in stop.value.code
    assert "--resume" in stop.value.code


# --- input and text -----------------------------------------------------------------------


def test_bad_command_lines_are_refused_in_one_line_each(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refusals, _ = faults.refused_lines(50)
    assert refusals == 50


def test_hostile_completions_are_judged_and_logged():
    completions = list(faults.hostile_completions(500))
    assert any(len(completion) > 2**20 - 100 for completion in completions)
    for completion in completions:
        faults.judge(completion)
