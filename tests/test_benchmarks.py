"""benchmarks/: that they run, at toy size. What they measure is no matter of a test."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_gpu_benchmark_runs_on_a_cpu():
    text = run("benchmarks/gpu.py", "--device", "cpu")
    for number in range(1, 9):
        assert f"{number}. " in text
    assert "toy size: no numbers" in text
    assert "the same seed repeats: True, another differs: True" in text


def test_the_step_benchmark_measures_this_trainer():
    text = run("benchmarks/step.py", "--trainers", "own", "--steps", "2", "--rounds", "1")
    assert "| this trainer | " in text


def test_a_random_checkpoint_is_measured_like_any_other(tmp_path):
    folder = str(tmp_path / "random")
    run("benchmarks/random_checkpoint.py", folder, "--like", "tiny")
    flags = ["--model", folder, "--prompts", "1", "--group-size", "2", "--image-size", "84"]
    sizes = ["--group-sizes", "2", "--lengths", "3", "--image-sizes", "56"]
    picture = tmp_path / "growth.png"
    text = run("benchmarks/growth.py", *flags, *sizes, "--picture", str(picture))
    rows = [line.split(" | ")[0] for line in text.splitlines() if line[2:3].isdigit()]
    assert rows == ["| 2", "| 3", "| 56"]
    assert picture.exists()


def test_the_naive_peer_runs():
    (line,) = run("benchmarks/peers.py", "naive", "--steps", "1").splitlines()
    step = json.loads(line)
    assert step["completion_tokens"] > 64
    assert step["prompt_tokens"] == 104
