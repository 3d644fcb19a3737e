"""Two processes compute the gradients of one, save and fail together, and resume each other's runs.

torchrun runs this file as a program, once in each of the two processes.
"""

import faulthandler
import importlib
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import TINY, config_of
from test_checkpoint import PARTS, fresh, trained, update
from torch.distributed.optim import ZeroRedundancyOptimizer

import grpo
import main
from config import workload_of
from engine.loading import load
from engine.parallel import connect, process_index, rank_and_world_size
from engine.passes import PassSize
from harness import checkpoint, runs
from harness.checkpoint import CheckpointError, checkpoints_of
from harness.memory import estimate, resident_bytes
from harness.runlog import read_lines

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "--preset tiny --device cpu --prompts-per-step 4 --group-size 2 --image-size 84"
FLAGS += " --max-new-tokens 24 --eval-every 2 --eval-examples 3 --save-every 2 --decay-steps 0"
TIMED = ("_s", "peak_gib")  # name endings of metrics that differ between runs
FAILURES = [(0, checkpoint, "check_room"), (1, torch, "save"), (0, checkpoint, "move_into_place")]
RUNS = {"full": ["--sync-reference-every", "3"], "adapter": ["--lora-rank", "2", "--lr", "1e-3"]}


# --- in each process ----------------------------------------------------------------------


class Noted(torch.optim.SGD):
    """Stores the gradients and updates nothing."""

    def step(self):
        self.gradients = [p.grad.clone() for p in self.param_groups[0]["params"]]


def one_step(loss: str) -> dict:
    """The examples, gradients and metrics of one step in fp64, of this process's shard."""
    config = config_of(*FLAGS.split(), "--loss", loss, "--inner-epochs", "1")
    loaded = load(TINY, device="cpu", dtype="float32", reference=True)
    loaded.policy.double(), loaded.reference.double()
    with torch.no_grad():
        loaded.reference.lm_head.weight.mul_(1.1)  # so that the KL is not 0
    optimizer = Noted(loaded.policy.parameters(), lr=0.0)
    examples, prompts = main.make_batch(config, loaded.processor, process_index(), 3)
    prompts = replace(prompts, pixel_values=prompts.pixel_values.double())
    metrics = main.take_step(
        config,
        3,
        iter([(examples, prompts)]),
        main.make_sampler(config, loaded),
        loaded,
        optimizer,
        PassSize(micro_batch=1),
    )[2]
    return {
        "indices": [example.index for example in examples],
        "gradients": optimizer.gradients,
        "metrics": {key: value for key, value in metrics.items() if not key.endswith(TIMED)},
    }


def start(runs: Path, name: str, kind: str, steps: int) -> None:
    flags = [*FLAGS.split(), *RUNS[kind], "--steps", str(steps)]
    main.main([*flags, "--runs", str(runs), "--name", name])


def save(folder: Path, name: str, loaded, optimizer, *, steps_done: int = 2) -> None:
    (folder / name).mkdir(exist_ok=True)
    checkpoint.save(folder / name, loaded, optimizer, steps_done=steps_done, keep=1, **PARTS)


def restored(folder: Path, name: str):
    state = fresh("bfloat16")
    assert checkpoint.restore(checkpoints_of(folder / name)[-1], *state) == 2
    return state


def own_states(loaded, optimizer) -> dict[str, dict]:
    """A copy of the optimizer state of each parameter that this process updates."""
    states = getattr(optimizer, "optim", optimizer).state
    names = {parameter: name for name, parameter in loaded.policy.named_parameters()}
    return {names[parameter]: deepcopy(state) for parameter, state in states.items()}


def save_and_restore(folder: Path) -> dict:
    """Save a checkpoint, fail to save the next, restore the first and one of a single process."""
    loaded, optimizer = trained("bfloat16")
    save(folder, "by-two", loaded, optimizer)
    saved, told = own_states(loaded, optimizer), []
    for number, owner, name in FAILURES:
        problem = mock.patch.object(owner, name, side_effect=OSError(f"cannot {name}"))
        with problem if process_index() == number else nullcontext():
            try:
                save(folder, "by-two", loaded, optimizer, steps_done=3)
            except CheckpointError as error:
                told.append(str(error))
    results = {"told": told, "saved": saved}
    for name in ("by-two", "by-one"):
        again, other = restored(folder, name)
        results[name] = own_states(again, other)
        results[f"{name}, copies"] = len(other.state)
        update(again, other, torch.Generator().manual_seed(7))
        results[f"{name}, after an update"] = list(again.policy.parameters())
    return results


def work(folder: Path) -> None:
    """Take a step with each loss, save, restore, start a run, resume one of a single process."""
    faulthandler.dump_traceback_later(300, exit=True)  # show where a process hangs
    torch.set_num_threads(1)
    connect(on_cpu=True)
    results = {loss: one_step(loss) for loss in grpo.LOSSES}
    results |= save_and_restore(folder)
    torch.save(results, folder / f"results-{process_index()}.pt")
    start(folder, "two-one", "full", 2)
    main.main(["--resume", str(folder / "one-two"), "--steps", "4"])


# --- results ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder where two processes have done their `work`, with runs of a single process."""
    folder = tmp_path_factory.mktemp("parallel")
    for kind in RUNS:
        start(folder, kind, kind, 4)
    start(folder, "one-two", "adapter", 2)
    save(folder, "by-one", *trained("bfloat16"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "--standalone", __file__, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    main.main(["--resume", str(folder / "two-one"), "--steps", "4"])
    return folder


@pytest.fixture(scope="module")
def results(folder) -> list[dict]:
    """The results of each of the two processes."""
    return [torch.load(folder / f"results-{i}.pt", weights_only=False) for i in range(2)]


def assert_close(line: dict, other: dict, tolerance: float) -> None:
    assert line["not_finite"] == other["not_finite"] == ""
    silent = {key for key, value in line.items() if value is None}  # a share of none
    assert silent == {key for key, value in other.items() if value is None}
    for key in line.keys() - {"not_finite"} - silent:
        if not key.endswith(TIMED):
            assert line[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), key


@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_two_processes_make_the_gradients_of_one(results, loss):
    alone = one_step(loss)
    first, second = (each[loss] for each in results)
    assert first["indices"] + second["indices"] == alone["indices"] == [12, 13, 14, 15]
    for one, other, whole in zip(*(x["gradients"] for x in (first, second, alone)), strict=True):
        assert torch.equal(one, other)
        assert (one - whole).norm() <= 1e-9 * whole.norm() + 1e-12
    assert alone["metrics"]["kl"] > 0.001
    assert first["metrics"] == second["metrics"]
    assert_close(first["metrics"], alone["metrics"], 1e-6)  # some are computed in fp32


@pytest.mark.parametrize(("name", "kind"), [("two-one", "full"), ("one-two", "adapter")])
def test_runs_go_on_with_another_number_of_processes(folder, name, kind):
    """The runs are equal up to rounding. One process writes, so each line is there once."""
    for file, key in (("metrics", "step"), ("evaluations", "steps_done"), ("samples", "step")):
        lines, expected = (read_lines(folder / run / f"{file}.jsonl") for run in (name, kind))
        assert [line[key] for line in lines] == [line[key] for line in expected]
    metrics, expected = (read_lines(folder / run / "metrics.jsonl") for run in (name, kind))
    for line, other in zip(metrics, expected, strict=True):
        assert_close(line, other, 1e-3)
    assert [path.name for path in checkpoints_of(folder / name)] == ["step-000004"]
    assert (folder / name / "final").is_dir()


def test_each_process_saves_its_share_of_the_optimizer(folder):
    files = sorted(checkpoints_of(folder / "by-two")[-1].glob("optimizer*"))
    assert [path.name for path in files] == ["optimizer-1-of-2.pt", "optimizer-2-of-2.pt"]
    first, second = (torch.load(path, weights_only=True)["state"] for path in files)
    assert sorted([*first, *second]) == list(range(len(trained()[1].param_groups[0]["params"])))
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 0.55 * sum(sizes)


@pytest.mark.parametrize("name", ["by-one", "by-two"])
def test_one_process_and_two_restore_the_same_moments(folder, results, name):
    """Bit for bit, from checkpoints of one and of two processes; so is the next update."""
    saved = results[0]["saved"] | results[1]["saved"]
    assert len(saved) == len(results[0]["saved"]) + len(results[1]["saved"])
    again, other = restored(folder, name)
    for found in (results[0][name] | results[1][name], own_states(again, other)):
        assert found.keys() == saved.keys()
        for parameter, state in found.items():
            assert state.keys() == {"exp_avg", "exp_avg_sq", "kahan_comp"}
            assert all(torch.equal(state[key], saved[parameter][key]) for key in state)
    never_saved = trained("bfloat16")
    for state in (never_saved, (again, other)):
        update(*state, torch.Generator().manual_seed(7))
    expected = list(never_saved[0].policy.parameters())
    assert all(map(torch.equal, again.policy.parameters(), expected))
    for each in results:
        assert all(map(torch.equal, each[f"{name}, after an update"], expected))
        assert each[f"{name}, copies"] == 0


def test_a_process_that_cannot_write_is_told_to_all(folder, results):
    told = [f"cannot {name}" for _, _, name in FAILURES]
    assert [each["told"] for each in results] == [told, told]
    left = [path.name for path in (folder / "by-two" / "checkpoints").iterdir()]
    assert left == ["step-000002"]  # complete: other tests restore it


def test_a_share_that_is_gone_is_told(folder, tmp_path):
    damaged = Path(shutil.copytree(checkpoints_of(folder / "by-two")[-1], tmp_path / "damaged"))
    (damaged / "optimizer-2-of-2.pt").unlink()
    assert checkpoint.has_optimizer(damaged)
    with pytest.raises(CheckpointError, match=r"damaged: .*optimizer-2-of-2\.pt"):
        checkpoint.restore(damaged, *fresh("bfloat16"))
    (damaged / "optimizer-1-of-2.pt").unlink()
    assert not checkpoint.has_optimizer(damaged)


ALL = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
ALL |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, (0, 1)),
        (ALL, (1, 2)),
        ({"RANK": "1"}, (0, 1)),  # left behind by another tool
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "1"}, (0, 1)),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: set without RANK and LOCAL_RANK and MASTER_ADDR and"),
        (ALL | {"RANK": ""}, "WORLD_SIZE=2: set without RANK;"),
        (ALL | {"MASTER_PORT": ""}, "WORLD_SIZE=2: set without MASTER_PORT;"),
        (ALL | {"RANK": "first"}, "RANK=first: must be a number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2: must be a number"),
    ],
)
def test_half_of_a_launchers_environment_is_not_believed(monkeypatch, environment, found):
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(found, tuple):
        assert rank_and_world_size() == found
        assert process_index() == 0  # there is no process group
    else:
        with pytest.raises(ValueError, match=found):
            rank_and_world_size()


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", TINY],
        ["cold_start", "--from-scratch", "--out", "nowhere"],
    ],
)
def test_what_runs_in_one_process_says_so(monkeypatch, capsys, command):
    for name, value in ALL.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(command[0]).main(command[1:])
    assert stop.value.code == 2
    assert "WORLD_SIZE=2: only main.py runs in several processes" in capsys.readouterr().err


def test_prompts_that_cannot_be_shared_out_are_refused(monkeypatch):
    monkeypatch.setattr(runs, "process_count", lambda: 3)
    with pytest.raises(ValueError, match="--prompts-per-step 4: must be a multiple of the 3 proc"):
        runs.connect_processes(4, on_cpu=True)


def test_processes_share_prompts_and_optimizer_in_the_memory_table():
    work = workload_of(config_of("--prompts-per-step", "8", "--micro-batch", "8"))
    alone, shared = (replace(work, processes=count) for count in (1, 4))
    for name, size in resident_bytes(alone).items():
        assert resident_bytes(shared)[name] == (
            size // 4 if name in ("optimizer", "key-value cache") else size
        )
    whole, part = (estimate(each, free=None).sizes["vision tower"] for each in (alone, shared))
    assert part == whole // 4


if __name__ == "__main__":
    gathered = AssertionError("one process gathers the whole state")
    with mock.patch.object(ZeroRedundancyOptimizer, "consolidate_state_dict", side_effect=gathered):
        work(Path(sys.argv[1]))
