"""sizes.py: parameter counts without loading, and errors on a machine that is too small."""

import pytest
import torch
from conftest import TINY

from engine.loading import load
from engine.model_files import ModelError
from engine.sizes import parameter_count, resolve_placement, shape_config


def test_parameter_counts():
    model = load(TINY, device="cpu", dtype="float32").policy
    assert parameter_count(shape_config(TINY)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "parameters"),  # counts from the hub
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
    ],
)
def test_the_shapes_known_without_a_download(model, parameters):
    assert parameter_count(shape_config(model)) == parameters


def test_a_machine_without_gpu_is_told_what_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError) as refusal:
        resolve_placement(
            "Qwen/Qwen2.5-VL-7B-Instruct",
            trained=8_292_166_656,
            reference=True,
            command_that_runs="python main.py --preset tiny",
        )
    gib = 8_292_166_656 * 12 / 2**30  # bf16: weight, gradient, Kahan, two moments, reference
    message = str(refusal.value)
    assert f"{gib:.1f} GiB" in message
    assert "no CUDA GPU" in message
    assert "python main.py --preset tiny" in message
    assert "\n" not in message


def test_too_little_memory_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("engine.sizes.free_memory", lambda device: (1000, 2000))
    with pytest.raises(ModelError, match=r"found: 0\.0 GiB free on cpu"):
        resolve_placement(TINY, command_that_runs="nothing")


def test_a_small_model_goes_to_the_cpu_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_placement(TINY, trained=1000, command_that_runs="") == ("cpu", "float32")
