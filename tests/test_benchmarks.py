"""benchmarks/: they run, at toy size. The tests check no measurement."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from pretended_gpu import FAST_FORMS, PretendedGPU
from transformers import AutoProcessor

from engine import fastpath

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # last, because it has a memory.py too

import gpu as gpu_benchmark  # noqa: E402
import growth  # noqa: E402
import peers  # noqa: E402
import random_checkpoint  # noqa: E402
import speedrun  # noqa: E402
import step  # noqa: E402


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- gpu.py -------------------------------------------------------------------------------


@pytest.fixture
def once(monkeypatch):
    """Run timed work only once, and forget all earlier checks of fast paths."""

    def milliseconds(self, work, repeats=5):
        work()
        return 1.0

    monkeypatch.setattr(gpu_benchmark.Bench, "milliseconds", milliseconds)
    monkeypatch.setattr(fastpath, "VERDICTS", {})


def test_the_gpu_benchmark_runs_on_a_cpu(once, capsys):
    gpu_benchmark.main(["--device", "cpu"])
    text = capsys.readouterr().out
    for number in range(10):
        assert f"{number}. " in text
    assert "toy size: no real timings" in text
    assert "the same seed repeats: True, another differs: True" in text


@pytest.mark.parametrize("run", ["7b", "7b-adapters"])
def test_the_gpu_benchmark_prints_every_table_on_a_pretended_gpu(once, monkeypatch, capsys, run):
    """At toy size with every fast path verified, so that the first run on a card meets no typo."""
    rank = gpu_benchmark.RUNS[run][1]
    toy = replace(gpu_benchmark.toy_shape(), lora_rank=rank)
    monkeypatch.setattr(gpu_benchmark, "true_shape", lambda run: toy)
    monkeypatch.setattr(gpu_benchmark, "saving_seconds", lambda mib: 1.0)
    monkeypatch.setattr(fastpath, "TOLERANCE", 0.02)
    with PretendedGPU(length=toy.longest):
        gpu_benchmark.main(["--run", run])
    text = capsys.readouterr().out
    for number in range(10):
        assert f"{number}. " in text
    assert "verified: " in text
    (verified,) = {line for line in text.splitlines() if line.startswith("verified: ")}
    assert {name for name in FAST_FORMS if name in verified} == FAST_FORMS - {fastpath.TRITON}
    assert "nan" not in text


def test_the_floors_of_an_h200_by_hand():
    """4.3 TB/s and 790 TFLOP/s; 8.29 billion parameters, of which 6.5255 in 28 decoder layers.

    Decoding reads 2 x (6.5255 + 0.5450) = 14.14 GB and 57,344 B in each of 32 x 389 filled slots:
    14.85 GB, 3.45 ms. 5,856 packed tokens, 4,800 of completions: 76.4 TFLOP in the layers, 5.2 for
    logits, 1.3 in the tower, 0.7 of attention; the update three times as much, less the tower's
    forward pass, and logits a fourth time. AdamW and the norm move 20 B of each parameter.
    """
    shape = replace(gpu_benchmark.true_shape("7b"), text_tokens=200)
    floors = gpu_benchmark.floors_ms(shape, gpu_benchmark.Card(4.3e12, 790e12))
    assert shape.prompt_length == 264
    assert sum(shape.lengths) == pytest.approx(4800, rel=0.01)
    assert floors[gpu_benchmark.TOKEN] == pytest.approx(3.46, rel=0.01)
    assert floors[gpu_benchmark.ROLLOUT] == pytest.approx(2 + 18 + 860, rel=0.01)
    assert floors[gpu_benchmark.REFERENCE] == pytest.approx(83.6 / 0.79, rel=0.01)
    update = 3 * (76.4 + 0.7) + 4 * 5.2 + 2 * 1.3
    assert floors[gpu_benchmark.UPDATE] == pytest.approx(update / 0.79 + 3.9, rel=0.01)
    assert floors[gpu_benchmark.OPTIMIZER] == pytest.approx(34.7, rel=0.01)


# --- the other benchmarks -------------------------------------------------------------------


def test_the_step_benchmark_measures_this_trainer():
    text = run("benchmarks/step.py", "--trainers", "own", "--steps", "2", "--rounds", "1")
    assert "| this trainer | " in text


def test_a_random_checkpoint_is_measured_like_any_other(tmp_path, capsys):
    folder = str(tmp_path / "random")
    random_checkpoint.main([folder, "--like", TINY])
    flags = ["--model", folder, "--prompts", "1", "--group-size", "2", "--image-size", "84"]
    sizes = ["--group-sizes", "2", "--lengths", "3", "--image-sizes", "56"]
    picture = tmp_path / "growth.png"
    growth.main([*flags, *sizes, "--picture", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ")[0] for line in lines if line[2:3].isdigit()]
    assert rows == ["| 2", "| 3", "| 56"]
    assert picture.exists()


def test_the_naive_peer_runs(capsys):
    peers.main(["naive", "--steps", "1"])
    (line,) = capsys.readouterr().out.splitlines()
    measured = json.loads(line)
    assert measured["completion_tokens"] > 64
    assert measured["prompt_tokens"] == 104


def test_the_stock_peer_samples_no_image_token():
    """Stock transformers would look for its image, and fail. So hot, all other tokens occur."""
    torch.manual_seed(0)
    task = peers.Task(prompts=1, group_size=64, max_new_tokens=200, temperature=1e4)
    processor, policy = AutoProcessor.from_pretrained(task.model), peers.load(task)
    prompts = peers.encode_prompts(processor, [peers.draw(task, 0)], task.group_size)
    _, completions, _ = peers.roll_out(policy, prompts, task, "dynamic")
    vocabulary = set(range(policy.config.text_config.vocab_size))
    assert set(completions.flatten().tolist()) == vocabulary - {policy.config.image_token_id}


def test_every_peer_has_a_name():
    assert step.TRAINERS.keys() - {"own"} == peers.PEERS.keys()


def test_a_trainer_that_fails_says_why():
    task = peers.Task(model="/no/where")
    for measure in (step.measure, lambda *rest: speedrun.seconds_to(2.5, *rest)):
        with pytest.raises(SystemExit, match=r"(?s)failed.*/no/where: no such folder"):
            measure("own", task, 2)


def test_a_run_ends_when_the_mean_of_ten_steps_reaches_the_target(monkeypatch):
    """A trainer that earns its step's number, in 0.5 s a step, for ever."""
    code = "import json, itertools\nfor i in itertools.count(): "
    code += "print(json.dumps({'step_s': 0.5, 'area_reward': i}), flush=True)"
    popen = subprocess.Popen

    def counting(command, **options):
        return popen([sys.executable, "-c", code], **options)

    monkeypatch.setattr(subprocess, "Popen", counting)
    # steps 6 to 15 have the mean 10.5
    assert speedrun.seconds_to(10.5, "own", peers.Task(), steps=100) == (8.0, 16)


@pytest.mark.parametrize("name", ["own", "naive"])
def test_a_run_that_never_gets_there_is_told(name):
    task = peers.Task(prompts=1, group_size=2, max_new_tokens=4, image_size=84)
    assert speedrun.seconds_to(3.1, name, task, steps=2) is None


def test_the_table_of_the_speedrun_by_hand(capsys):
    found = {"own": [(30.0, 40), (20.0, 30), (50.0, 60)], "trl": [(90.0, 50), None, (60.0, 45)]}
    speedrun.report(found, 200)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| this trainer | 30 | 1.0 | 30, 20, 50 | 40 |",
        "| TRL's GRPOTrainer | 90 | 3.0 | 90, never, 60 | 50 |",
    ]
