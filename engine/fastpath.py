"""Fast paths that only some GPUs have, each checked against a reference implementation first."""

import os
import warnings
from collections.abc import Callable

import optimi
import torch
from torch import Tensor

TOLERANCE = 0.02  # relative; a bf16 result is off by 0.003 to 0.005, a wrong mask by far more
FP32_OUTPUT = "matmul with fp32 output"
TRITON = "optimi's Triton kernel for AdamW"
VERDICTS: dict[str, bool] = {}  # check results by name


def prepare_gpu() -> None:
    """Set torch's GPU options. Call it before the first CUDA call, which reads them.

    The allocator uses one range that grows: otherwise the gaps that a step's activations leave fit
    nothing else. cuDNN attention, which torch prefers on Hopper, is off: with a mask and large
    scores it has returned nan gradients (pytorch#196678), and it plans for half a second at every
    new length. bf16 matmuls accumulate in fp32 only.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer of its two names
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def verify(name: str, check: Callable[[], float]) -> bool:
    """Return whether a fast path passes `check`, which runs once and returns its relative error.

    A fast path that raises or exceeds TOLERANCE is disabled, with one warning. Never call this
    inside a layer: if the layer is compiled, captured or recomputed, the check would become part
    of it. Call `is_verified` there, after the check has run.
    """
    if name not in VERDICTS:
        VERDICTS[name] = True  # so that the check runs the fast path
        try:
            difference = check()
            fault = f"it differs from the reference by {100 * difference:.1f} %"
        except Exception as error:  # a missing kernel or compiler can raise anything
            difference = torch.inf
            fault = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        VERDICTS[name] = difference <= TOLERANCE
        if not VERDICTS[name]:
            warnings.warn(f"running slower without {name}: {fault}", stacklevel=2)
    return VERDICTS[name]


def is_verified(name: str) -> bool:
    """Return whether a fast path has passed its check."""
    return VERDICTS.get(name, False)


def relative_difference(fast: Tensor, slow: Tensor) -> float:
    """Return |fast - slow| / |slow| (Euclidean, over all elements), infinite if that is nan.

    Zero if both are equal, even if both are zero.
    """
    slow = slow.detach().double()
    distance = (fast.detach().double() - slow).norm()
    difference = torch.where(distance == 0, 0.0, distance / slow.norm())
    return difference.nan_to_num(torch.inf, posinf=torch.inf).item()  # host sync, once


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in fp32, or in fp64 if both are fp64; a (m, k) and b (k, n) share a dtype.

    Rounding to bf16 would put an error of up to 0.06 on a logit of 25. Not for autograd.
    """
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda and verify(FP32_OUTPUT, lambda: check_matmul(a.device, a.dtype)):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that `matmul_fp32` returns: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def check_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return the relative error of the matmul with fp32 output, against one of fp32 copies."""
    a, b = torch.randn(2, 256, 256, device=device).to(dtype)
    return relative_difference(torch.mm(a, b, out_dtype=torch.float32), a.float() @ b.float())


def verify_triton(like: Tensor) -> bool:
    """Return whether optimi's Triton kernel may update weights like these, one pass per weight.

    The kernel is compiled at its first use, which needs a C compiler and Python's headers. It is
    for bf16 only: for other dtypes its optimizer state differs from that of torch's operations.
    """
    return (like.is_cuda and like.dtype == torch.bfloat16) and verify(
        TRITON, lambda: check_adamw(like, triton=True)
    )


def check_adamw(like: Tensor, *, triton: bool) -> float:
    """Return the relative error of AdamW's updates of weights like these, against torch in fp32.

    A bf16 update is the change of weight plus Kahan compensation. The kernel rounds only its
    results, torch rounds after every operation: both are off by 0.002 to 0.004.
    """
    start = torch.randn(4096, device=like.device).to(like.dtype)
    gradients = torch.randn(8, 4096, device=like.device).to(like.dtype)
    exact = movement(start.float(), gradients.float(), triton=False)
    return relative_difference(movement(start, gradients, triton=triton), exact)


def movement(start: Tensor, gradients: Tensor, *, triton: bool) -> Tensor:
    """Return AdamW's total update of weights (n,) by gradients (steps, n), in fp32."""
    weight = torch.nn.Parameter(start.clone())
    optimizer = optimi.AdamW([weight], lr=1e-3, weight_decay=0.0, triton=triton)
    for gradient in gradients.clone():  # the optimizer overwrites them
        weight.grad = gradient
        optimizer.step()
    moved = weight.detach().float() - start.float()
    if weight.dtype == torch.bfloat16:
        moved += optimizer.state[weight]["kahan_comp"].float()
    return moved
