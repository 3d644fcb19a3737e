"""fastpath.py: what is trusted, and what is not."""

import warnings

import pytest
import torch

import fastpath
from fastpath import matmul_fp32, relative_difference, trusted


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
        assert trusted("a kernel", lambda: calls.append(1) or 0.004)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        (lambda: 0.5, "off from its slow form by 50.0 %"),
        (lambda: float("nan"), "off from its slow form"),
        (raises(RuntimeError("no kernel image\nfor this device")), "RuntimeError: no kernel image"),
        (raises(AttributeError()), "AttributeError"),
        (raises(TypeError("mm() got an unexpected keyword")), "unexpected keyword"),
    ],
)
def test_what_fails_or_differs_is_given_up_with_one_warning(check, fault):
    with pytest.warns(UserWarning, match="slower without a kernel: ") as told:
        assert not trusted("a kernel", check)
    assert fault in str(told[0].message)
    assert "\n" not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not trusted("a kernel", check)


def test_the_relative_difference_by_hand():
    slow = torch.tensor([3.0, 4.0])
    assert relative_difference(torch.tensor([3.0, 4.5]), slow) == pytest.approx(0.1)
    assert relative_difference(slow, slow) == 0.0
    assert relative_difference(torch.tensor([3.0, torch.nan]), slow) == torch.inf


def test_products_of_bf16_are_not_rounded():
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = a.double() @ b.double()
    assert (matmul_fp32(a, b) - exact).abs().max() < 1e-4
    assert ((a @ b) - exact).abs().max() > 1e-2
    assert matmul_fp32(a.double(), b.double()).dtype == torch.float64
