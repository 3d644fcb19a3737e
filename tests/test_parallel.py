"""parallel.py: two processes make the gradients of one, and go on with each other's runs.

Run as a program, by torchrun, this file is what the two processes do.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, config_of

import grpo
import main
from checkpoint import checkpoints_of
from memory import estimate
from parallel import process_index
from policy import load
from runlog import read_lines

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--preset tiny --device cpu --prompts-per-step 4 --group-size 2 --image-size 84"
FLAGS += " --max-new-tokens 24 --eval-every 2 --eval-examples 3 --save-every 2"
TIMED = ("_s", "peak_gib")  # ends of the names of values that are never the same
RUNS = {"full": ["--sync-reference-every", "3"], "adapter": ["--lora-rank", "2", "--lr", "1e-3"]}


# --- what each process does ---------------------------------------------------------------


class Noted(torch.optim.SGD):
    """Keeps the gradients it is given, and moves nothing."""

    def step(self):
        self.gradients = [p.grad.clone() for p in self.param_groups[0]["params"]]


def one_step(loss: str) -> dict:
    """A step's completions, gradients and statistics, in fp64, this process's share of it."""
    config = config_of(*FLAGS.split(), "--loss", loss, "--inner-epochs", "1")
    loaded = load(TINY, device="cpu", dtype="float32", reference=True)
    loaded.policy.double(), loaded.reference.double()
    with torch.no_grad():
        loaded.reference.lm_head.weight.mul_(1.1)  # so that there is a KL
    optimizer = Noted(loaded.policy.parameters(), lr=0.0)
    examples, prompts = main.Batches(config, loaded.processor)[3]
    prompts = replace(prompts, pixel_values=prompts.pixel_values.double())
    metrics = main.take_step(
        config,
        3,
        iter([(examples, prompts)]),
        main.make_sampler(config, loaded),
        loaded,
        optimizer,
        grpo.Passes(micro_batch=1),
    )[2]
    return {
        "indices": [example.index for example in examples],
        "gradients": optimizer.gradients,
        "metrics": {key: value for key, value in metrics.items() if not key.endswith(TIMED)},
    }


def start(runs: Path, name: str, kind: str, steps: int) -> None:
    flags = [*FLAGS.split(), *RUNS[kind], "--steps", str(steps)]
    main.main([*flags, "--runs", str(runs), "--name", name])


def work(folder: Path) -> None:
    """Make a step with each loss, begin a run, and go on with one that a single process began."""
    torch.set_num_threads(1)
    main.join(on_cpu=True)
    steps = {loss: one_step(loss) for loss in grpo.LOSSES}
    torch.save(steps, folder / f"steps-{process_index()}.pt")
    start(folder, "two-one", "full", 2)
    main.main(["--resume", str(folder / "one-two"), "--steps", "4"])


# --- and what comes of it -----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have done their `work`, beside runs of a single one."""
    folder = tmp_path_factory.mktemp("parallel")
    for kind in RUNS:
        start(folder, kind, kind, 4)
    start(folder, "one-two", "adapter", 2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "--standalone", __file__, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    main.main(["--resume", str(folder / "two-one"), "--steps", "4"])
    return folder


def assert_close(line: dict, other: dict, tolerance: float) -> None:
    assert line["not_finite"] == other["not_finite"] == ""
    for key in line.keys() - {"not_finite"}:
        if not key.endswith(TIMED):
            assert line[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), key


@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_two_processes_make_the_gradients_of_one(folder, loss):
    alone = one_step(loss)
    first, second = (
        torch.load(folder / f"steps-{number}.pt", weights_only=False)[loss] for number in (0, 1)
    )
    assert first["indices"] + second["indices"] == alone["indices"] == [12, 13, 14, 15]
    for one, other, whole in zip(*(x["gradients"] for x in (first, second, alone)), strict=True):
        assert torch.equal(one, other)
        assert (one - whole).norm() <= 1e-9 * whole.norm() + 1e-12
    assert alone["metrics"]["kl"] > 0.001
    assert first["metrics"] == second["metrics"]
    assert_close(first["metrics"], alone["metrics"], 1e-6)  # some are made in fp32


@pytest.mark.parametrize(("name", "kind"), [("two-one", "full"), ("one-two", "adapter")])
def test_runs_go_on_with_another_number_of_processes(folder, name, kind):
    """The same run but for rounding; one process writes, and everything is there once."""
    for file, key in (("metrics", "step"), ("evaluations", "steps_done"), ("samples", "step")):
        lines, expected = (read_lines(folder / run / f"{file}.jsonl") for run in (name, kind))
        assert [line[key] for line in lines] == [line[key] for line in expected]
    metrics, expected = (read_lines(folder / run / "metrics.jsonl") for run in (name, kind))
    for line, other in zip(metrics, expected, strict=True):
        assert_close(line, other, 1e-3)
    assert [path.name for path in checkpoints_of(folder / name)] == ["step-000004"]
    assert (folder / name / "final").is_dir()


def test_prompts_that_cannot_be_shared_out_are_refused(monkeypatch):
    monkeypatch.setattr(main, "process_count", lambda: 3)
    config = config_of(*FLAGS.split())
    with pytest.raises(ValueError, match="--prompts-per-step 4: must be a multiple of the 3 proc"):
        main.meet(config)


def test_processes_share_prompts_and_optimizer_in_the_memory_table():
    work = main.work_of(config_of("--prompts-per-step", "8", "--micro-batch", "8"))
    alone, shared = (estimate(replace(work, processes=count), free=None) for count in (1, 4))
    for name, size in alone.items():
        if name in ("optimizer", "key-value cache", "vision tower"):
            assert shared[name] == size // 4
        elif name in ("weights", "gradients", "reference"):
            assert shared[name] == size


if __name__ == "__main__":
    work(Path(sys.argv[1]))
