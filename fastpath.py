"""Faster forms that only some GPUs have, each trusted after it has agreed with its slow form."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 0.02  # relative; a bf16 result is off by 0.003 to 0.005, a wrong mask by far more
VERDICTS: dict[str, bool] = {}  # of the forms that have been checked


def trusted(name: str, check: Callable[[], float]) -> bool:
    """Return whether a fast form may be used: `check`, called once, tells how far it is off.

    A form that raises or is off by more than TOLERANCE is given up, with one warning.
    """
    if name not in VERDICTS:
        try:
            difference = check()
            fault = f"it is off from its slow form by {100 * difference:.1f} %"
        except Exception as error:  # a missing kernel or compiler shows itself in many ways
            difference = torch.inf
            fault = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        VERDICTS[name] = difference <= TOLERANCE
        if not VERDICTS[name]:
            warnings.warn(f"slower without {name}: {fault}", stacklevel=2)
    return VERDICTS[name]


def relative_difference(fast: Tensor, slow: Tensor) -> float:
    """Return |fast - slow| / |slow| (Euclidean, over all elements), infinite if that is nan."""
    slow = slow.detach().double()
    difference = (fast.detach().double() - slow).norm() / slow.norm()
    return difference.nan_to_num(torch.inf).item()  # host sync, once


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, (m, k) and (k, n) of one dtype, in fp32, or in fp64 if they are fp64.

    Rounding the product to bf16 would put an error of up to 0.06 on a logit of 25. No gradient.
    """
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda and trusted("matmul with fp32 output", lambda: check_matmul(a.device, a.dtype)):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of what `matmul_fp32` makes of this one: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def check_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return how far the fp32-output product is off from that of fp32 copies."""
    a, b = torch.randn(2, 256, 256, device=device).to(dtype)
    return relative_difference(torch.mm(a, b, out_dtype=torch.float32), a.float() @ b.float())
