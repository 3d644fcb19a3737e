"""fastpath.py: fast paths that pass their checks, and others that do not."""

import os
import warnings

import optimi
import pytest
import torch

from engine import fastpath
from engine.fastpath import (
    check_adamw,
    is_verified,
    matmul_fp32,
    prepare_gpu,
    relative_difference,
    verify,
    verify_triton,
)


@pytest.fixture(autouse=True)
def no_verdicts(monkeypatch):
    monkeypatch.setattr(fastpath, "VERDICTS", {})


def raises(error: Exception):
    def check():
        raise error

    return check


def test_what_agrees_is_used_and_checked_once():
    calls = []
    for _ in range(3):
        assert verify("a kernel", lambda: calls.append(1) or 0.004)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        (lambda: 0.5, "differs from the reference by 50.0 %"),
        (lambda: float("nan"), "differs from the reference"),
        (raises(RuntimeError("no kernel image\nfor this device")), "RuntimeError: no kernel image"),
        (raises(AttributeError()), "AttributeError"),
        (raises(TypeError("mm() got an unexpected keyword")), "unexpected keyword"),
    ],
)
def test_what_fails_or_differs_is_given_up_with_one_warning(check, fault):
    with pytest.warns(UserWarning, match="running slower without a kernel: ") as told:
        assert not verify("a kernel", check)
    assert fault in str(told[0].message)
    assert "\n" not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not verify("a kernel", check)


def test_the_relative_difference_by_hand():
    slow = torch.tensor([3.0, 4.0])
    assert relative_difference(torch.tensor([3.0, 4.5]), slow) == pytest.approx(0.1)
    assert relative_difference(slow, slow) == 0.0
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_difference(slow, torch.zeros(2)) == torch.inf
    assert relative_difference(torch.full((2,), torch.nan), torch.zeros(2)) == torch.inf
    assert relative_difference(torch.tensor([3.0, torch.nan]), slow) == torch.inf


def test_products_of_bf16_are_not_rounded():
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = a.double() @ b.double()
    assert (matmul_fp32(a, b) - exact).abs().max() < 1e-4
    assert ((a @ b) - exact).abs().max() > 1e-2
    assert matmul_fp32(a.double(), b.double()).dtype == torch.float64


def test_a_form_is_used_while_it_is_checked_and_not_before():
    assert not is_verified("a kernel")
    assert verify("a kernel", lambda: 0.0 if is_verified("a kernel") else 1.0)
    assert is_verified("a kernel")


# --- AdamW's Triton kernel ----------------------------------------------------------------

BF16 = torch.zeros(1, dtype=torch.bfloat16)


def test_what_torchs_operations_round_is_far_below_the_tolerance():
    """Compares weight plus Kahan compensation with AdamW in fp32. The kernel rounds less."""
    torch.manual_seed(0)
    assert check_adamw(BF16, triton=False) < 0.005
    assert check_adamw(torch.zeros(1), triton=False) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"kahan_sum": False},  # bf16 rounding loses updates
        {"betas": (0.5, 0.99)},
        {"eps": 0.1},
        {"lr": 1.1e-3},
    ],
)
def test_an_optimizer_that_does_something_else_is_noticed(monkeypatch, wrong):
    class Wrong(optimi.AdamW):
        def __init__(self, parameters, **options):
            changed = wrong if parameters[0].dtype == torch.bfloat16 else {}
            super().__init__(parameters, **(options | changed))

    monkeypatch.setattr(optimi, "AdamW", Wrong)
    with pytest.warns(UserWarning, match="running slower without an optimizer"):
        assert not verify("an optimizer", lambda: check_adamw(BF16, triton=False))


def test_triton_is_for_bf16_weights_on_a_gpu(monkeypatch):
    """If it does not compile, a warning says so and torch runs instead."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    assert not verify_triton(BF16)
    assert not verify_triton(BF16.float().as_subclass(OnGpu))
    assert fastpath.VERDICTS == {}
    monkeypatch.setattr(fastpath, "check_adamw", lambda *_, triton: 0.003)
    assert verify_triton(BF16.as_subclass(OnGpu))
    fastpath.VERDICTS.clear()

    def no_compiler(*_, triton):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(fastpath, "check_adamw", no_compiler)
    with pytest.warns(UserWarning, match="slower without optimi's Triton kernel .* C compiler"):
        assert not verify_triton(BF16.as_subclass(OnGpu))


# --- torch's GPU options ------------------------------------------------------------------


@pytest.fixture
def torch_as_it_comes(monkeypatch):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it after the test
        monkeypatch.delenv(name)
    matmul = torch.backends.cuda.matmul
    before = torch.backends.cuda.cudnn_sdp_enabled()
    reduced = matmul.allow_bf16_reduced_precision_reduction
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)
    matmul.allow_bf16_reduced_precision_reduction = reduced


def test_a_gpu_is_prepared(torch_as_it_comes):
    torch.backends.cuda.enable_cudnn_sdp(True)
    prepare_gpu()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_the_users_own_allocator_settings_stay(torch_as_it_comes, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    prepare_gpu()
    found = {key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")}
    assert found == {name: "max_split_size_mb:512"}
