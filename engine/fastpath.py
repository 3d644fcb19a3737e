"""Faster forms that only some GPUs have, each trusted after it has agreed with its slow form."""

import os
import warnings
from collections.abc import Callable

import optimi
import torch
from torch import Tensor

TOLERANCE = 0.02  # relative; a bf16 result is off by 0.003 to 0.005, a wrong mask by far more
FP32_OUTPUT = "matmul with fp32 output"
TRITON = "optimi's Triton kernel for AdamW"
VERDICTS: dict[str, bool] = {}  # of the forms that have been checked


def prepare_gpu() -> None:
    """Choose what torch leaves to its user, before a GPU is first asked for anything: torch reads
    the allocator's settings then.

    Memory comes from one range that grows: the holes that a step's activations leave would
    otherwise fit nothing else. Attention is not cuDNN's, which torch prefers on Hopper: with a mask
    and large scores it has given nan gradients (pytorch#196678), and it plans for half a second
    whenever a length is new. Products of bf16 are added up in fp32 to the last.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer of its two names
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def trusted(name: str, check: Callable[[], float]) -> bool:
    """Return whether a fast form may be used: `check`, called once, tells how far it is off.

    A form that raises or is off by more than TOLERANCE is given up, with one warning. Not to be
    asked inside a layer, which may be compiled, recorded or run again for its gradient: the check's
    work would be taken for the layer's. There `is_trusted` says what was found before.
    """
    if name not in VERDICTS:
        VERDICTS[name] = True  # the check runs it
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


def is_trusted(name: str) -> bool:
    """Return whether a form has been checked, and agreed."""
    return VERDICTS.get(name, False)


def relative_difference(fast: Tensor, slow: Tensor) -> float:
    """Return |fast - slow| / |slow| (Euclidean, over all elements), infinite if that is nan.

    Zero where they are equal, also if both are zero.
    """
    slow = slow.detach().double()
    distance = (fast.detach().double() - slow).norm()
    difference = torch.where(distance == 0, 0.0, distance / slow.norm())
    return difference.nan_to_num(torch.inf, posinf=torch.inf).item()  # host sync, once


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, (m, k) and (k, n) of one dtype, in fp32, or in fp64 if they are fp64.

    Rounding the product to bf16 would put an error of up to 0.06 on a logit of 25. No gradient.
    """
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda and trusted(FP32_OUTPUT, lambda: check_matmul(a.device, a.dtype)):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of what `matmul_fp32` makes of this one: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def check_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return how far the fp32-output product is off from that of fp32 copies."""
    a, b = torch.randn(2, 256, 256, device=device).to(dtype)
    return relative_difference(torch.mm(a, b, out_dtype=torch.float32), a.float() @ b.float())


def trust_triton(like: Tensor) -> bool:
    """Return whether AdamW may update such weights by optimi's Triton kernel, in one pass of each.

    It is compiled at its first use, for which there must be a C compiler and Python's headers. For
    bf16 weights only: of others it keeps another state than torch's operations do.
    """
    return (like.is_cuda and like.dtype == torch.bfloat16) and trusted(
        TRITON, lambda: check_adamw(like, triton=True)
    )


def check_adamw(like: Tensor, *, triton: bool) -> float:
    """Return how far AdamW's updates of such weights, in some form, are off from torch's in fp32.

    Of bf16 weights what counts is weight and Kahan compensation together. The kernel rounds its
    results alone, torch's operations each of theirs: either is off by 0.002 to 0.004.
    """
    start = torch.randn(4096, device=like.device).to(like.dtype)
    gradients = torch.randn(8, 4096, device=like.device).to(like.dtype)
    exact = movement(start.float(), gradients.float(), triton=False)
    return relative_difference(movement(start, gradients, triton=triton), exact)


def movement(start: Tensor, gradients: Tensor, *, triton: bool) -> Tensor:
    """Return how far AdamW moves weights (n,) with some gradients (steps, n), in fp32."""
    weight = torch.nn.Parameter(start.clone())
    optimizer = optimi.AdamW([weight], lr=1e-3, weight_decay=0.0, triton=triton)
    for gradient in gradients.clone():  # the optimizer writes over them
        weight.grad = gradient
        optimizer.step()
    moved = weight.detach().float() - start.float()
    if weight.dtype == torch.bfloat16:
        moved += optimizer.state[weight]["kahan_comp"].float()
    return moved
