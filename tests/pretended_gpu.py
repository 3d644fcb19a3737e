"""A GPU that computes nothing: its tensors have shapes, strides and dtypes, but no values.

Within `PretendedGPU()`, the GPU code path runs to its end on any machine and at any size. Host
tensors are computed as usual; tensors on device cuda are on torch's meta device, but say cuda. The
pretended GPU records

    reads      the project's lines where the host waits for a value from the device
    allocated  bytes on the device, now and at the peak, with the workspace of kernels

and refuses what a GPU refuses: an operation on host and device tensors, a batch that cannot be
pinned, a read while a CUDA graph is being captured. Each function cites the source it imitates.
"""

import sys
import weakref
from bisect import bisect_left, insort
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from linecache import getline
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import optimi
import peft.peft_model
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import Qwen2_5_VLForConditionalGeneration

from engine import attention, fastpath, sampling

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
META, GPU = torch.device("meta"), torch.device("cuda", 0)
aten = torch.ops.aten
READS_A_SHAPE = {  # operators whose result's shape depends on values
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
}
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default}
FAST_FORMS = {  # every fast path that is verified before its first use
    sampling.COMPILED,
    sampling.CAPTURED,
    attention.FLASH,
    attention.DECODING,
    fastpath.FP32_OUTPUT,
    fastpath.TRITON,
}
TRANSFERS = {aten.copy_.default, aten._to_copy.default}


class DeviceTensor(torch.Tensor):
    """A meta tensor that says it is on the GPU, except to the meta kernels that infer shapes."""

    in_kernel = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, meta: torch.Tensor) -> "DeviceTensor":
        return torch.Tensor._make_subclass(cls, meta, meta.requires_grad)

    @property
    def device(self) -> torch.device:
        return META if DeviceTensor.in_kernel else GPU

    @property
    def is_cuda(self) -> bool:
        return not DeviceTensor.in_kernel

    @property
    def is_meta(self) -> bool:
        return DeviceTensor.in_kernel

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("a tensor of the pretended GPU outlived it")


@dataclass
class PretendedGPU:
    """A context manager, within which device cuda exists and has `gib` GiB.

    The host reads integers as `length`, floats as 0.0, and a single bool as True, those of a whole
    tensor as False. Unless `rows_finish`, `finished.all()` reads as False.
    """

    gib: float = 140
    context_gib: float = 1.0  # memory of the CUDA context and its libraries
    rows_finish: bool = True
    length: int = 7  # what integers are read as
    lengths: list[int] = field(default_factory=list)  # what a row of that many integers is read as
    reads: Counter = field(default_factory=Counter)  # (file, statement) -> times
    allocated: int = 0
    peak: int = 0
    live: dict = field(default_factory=dict)  # storage -> (bytes, number)
    history: list = field(default_factory=list)  # (number, bytes): new; (-number, bytes): freed
    uploads: Counter = field(default_factory=Counter)  # blocking copies to the device, as `reads`
    capturing: bool = False
    wants_meta: bool = False

    def __enter__(self) -> "PretendedGPU":
        self.stack = ExitStack()
        self.stack.callback(torch.backends.cuda.enable_cudnn_sdp, False)
        torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default
        for patch in patches(self):
            self.stack.enter_context(patch)
        self.stack.enter_context(FunctionMode(self))
        self.stack.enter_context(DispatchMode(self))
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()

    # --- queries --------------------------------------------------------------------------

    def free(self, device=None) -> tuple[int, int]:
        """Return free and total bytes, like torch.cuda.mem_get_info."""
        total = int(self.gib * GIB)
        return total - int(self.context_gib * GIB) - self.allocated, total

    def reset_peak(self, device=None) -> None:
        self.peak = self.allocated

    def unmarked_reads(self) -> list[str]:
        """Return the project's statements that read from the device without saying so."""
        return [text for _, text in self.reads if "host sync" not in text]

    # --- records --------------------------------------------------------------------------

    def read(self, tensor: torch.Tensor) -> None:
        """Record that the host waits for values."""
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.reads[statement()] += 1

    def upload(self, non_blocking: bool = False) -> None:
        """Record that the host sends values, if it waits for the copy."""
        if not non_blocking:
            self.uploads[statement()] += 1

    def value(self, tensor: torch.Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:
            return self.rows_finish or "finished.all()" not in statement()[1]
        return 0.0 if tensor.dtype.is_floating_point else self.length

    def values(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a host tensor with the values that the host reads."""
        dtype = dtype or tensor.dtype
        integers = not (dtype.is_floating_point or dtype == torch.bool)
        if integers and tensor.shape == (len(self.lengths),):
            return torch.tensor(self.lengths, dtype=dtype)
        return torch.full(tuple(tensor.shape), self.length * integers, dtype=dtype)

    def on_host(self, thing):
        """Return `thing` with all its tensors on the host, for code that writes files."""
        return tree_map(lambda x: self.values(x) if isinstance(x, DeviceTensor) else x, thing)

    def hold(self, tensor: "DeviceTensor") -> None:
        """Count the memory of a new tensor until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            return
        number = len(self.history) + 1
        self.live[key] = (size, number)
        self.history.append((number, size))
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self.release, key, number)

    def release(self, key: int, number: int) -> None:
        size, held = self.live.get(key, (0, 0))
        if held == number:
            del self.live[key]
            self.allocated -= size
            self.history.append((-number, size))

    def pass_by(self, size: int) -> None:
        """Count the workspace that a kernel allocates while it runs."""
        number = len(self.history) + 1
        self.history += [(number, size), (-number, size)]
        self.peak = max(self.peak, self.allocated + size)


# --- dispatch ---------------------------------------------------------------------------------


class FunctionMode(TorchFunctionMode):
    """Redirects calls that ask for device cuda to meta."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        wanted = kwargs.get("device")
        if func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, (args[0], GPU)
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], (str, torch.device)):
            args = (args[0], elsewhere(args[1]), *args[2:])
        if isinstance(wanted, (str, torch.device)):
            kwargs["device"] = elsewhere(wanted)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META != wanted:
            return func(*args, **kwargs | {"device": "cpu"}).to(META)  # values are from the host
        generator = kwargs.get("generator")
        if generator is not None and isinstance(args[0], DeviceTensor) != generator.of_the_gpu:
            raise RuntimeError(f"{func}: expected a generator of the tensor's device")
        before = self.gpu.wants_meta
        self.gpu.wants_meta = wanted is not None and torch.device(wanted).type == "meta"
        try:
            return func(*args, **kwargs)
        finally:
            self.gpu.wants_meta = before


def elsewhere(device: str | torch.device) -> torch.device:
    """Return meta for the GPU, and any other device as it is."""
    device = torch.device(device)
    return META if device.type == "cuda" else device


class DispatchMode(TorchDispatchMode):
    """Runs operators on shapes only if a tensor is on the GPU, and on values otherwise."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = tensors_in(args) + tensors_in(kwargs.values())
        if any(isinstance(tensor, DeviceTensor) for tensor in tensors):
            return self.on_device(func, tensors, args, kwargs)
        device = kwargs.get("device")
        if device is not None and device.type == "meta" and not self.gpu.wants_meta:
            if func is aten._to_copy.default:  # from the host
                self.gpu.upload(kwargs.get("non_blocking", False))
                return self.kept(torch.empty_like(args[0], dtype=kwargs.get("dtype"), device=META))
            return self.kept(func(*args, **kwargs))
        return func(*args, **kwargs)

    def on_device(self, func, tensors, args, kwargs):
        on_host = [t for t in tensors if not isinstance(t, DeviceTensor) and t.dim() > 0]
        if on_host and func not in TRANSFERS:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        if func is aten._local_scalar_dense.default:
            self.gpu.read(args[0])
            return self.gpu.value(args[0])
        if func in READS_A_SHAPE or (func in INDEXED and has_mask(args[1])):
            raise RuntimeError(f"{func} on the device: its shape depends on values")
        if func in PRODUCTS and len({tensor.dtype for tensor in tensors}) > 1:
            raise RuntimeError(f"{func}: expected all tensors to have one dtype")
        if func is aten.equal.default:
            self.gpu.read(args[0])
            return True
        device = kwargs.get("device")
        if device is not None and device.type == "cpu":
            self.gpu.read(args[0])
            return self.gpu.values(args[0], kwargs.get("dtype"))
        if func is aten.copy_.default and on_host:
            if not isinstance(args[0], DeviceTensor):
                self.gpu.read(args[1])
            else:
                self.gpu.upload(*args[2:], **kwargs)
            return args[0]
        out = of_shape(func, args, kwargs, tensors)
        if hidden := hidden_bytes(func, args):
            self.gpu.pass_by(hidden)
        return self.kept(out)

    def kept(self, out):
        """Return results as GPU tensors, with their memory counted."""
        if isinstance(out, (list, tuple)):
            return type(out)(self.kept(each) for each in out)
        if isinstance(out, torch.Tensor):
            out = out if isinstance(out, DeviceTensor) else DeviceTensor(out)
            self.gpu.hold(out)
        return out


SHAPES = {}  # (operator, looks of its arguments) -> looks of its results


class Look(NamedTuple):
    """All that the meta device knows of a tensor."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def of_shape(func, args, kwargs, tensors):
    """Return the results of an operator on meta tensors.

    Caches the shapes, because a model's layers ask for the same ones again and again.
    """
    key = None
    if not (func.is_view or func._schema.is_mutable):
        key = (func, looks(args), looks(kwargs.values()))
        if key in SHAPES:
            return made(SHAPES[key])
    with torch._C._DisableTorchDispatch(), shown_as_meta():
        out = func(*args, **kwargs)
    if key and is_new_memory(out, tensors):
        SHAPES[key] = look(out)
    return out


def is_new_memory(out, tensors) -> bool:
    """Return whether all results are tensors, and none shares memory with an argument."""
    results = out if isinstance(out, (tuple, list)) else (out,)
    known = {tensor.untyped_storage()._cdata for tensor in tensors}
    return all(
        isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in known for x in results
    )


def looks(arguments) -> tuple:
    """Return the look of each argument."""
    return tuple(look(argument) for argument in arguments)


def look(x):
    """Return a hashable form of an argument; it includes the type, since 1 == True."""
    if isinstance(x, torch.Tensor):
        return Look(tuple(x.shape), x.stride(), x.dtype)
    return looks(x) if isinstance(x, (list, tuple)) else (type(x), x)


def made(look):
    """Return meta tensors with this look."""
    if isinstance(look, Look):
        return torch.empty_strided(look.size, look.strides, dtype=look.dtype, device=META)
    return tuple(made(each) for each in look)


@contextmanager
def shown_as_meta():
    DeviceTensor.in_kernel = True
    try:
        yield
    finally:
        DeviceTensor.in_kernel = False


def tensors_in(arguments) -> list[torch.Tensor]:
    """Return the tensors among an operator's arguments, including those in lists."""
    found = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += tensors_in(argument)
    return found


def has_mask(indices) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def statement() -> tuple[str, str]:
    """Return file name and text of the project's innermost running statement."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if is_the_projects(path):
            first, last = lines_of(frame)
            return path.name, "".join(getline(str(path), n) for n in range(first, last + 1)).strip()
        frame = frame.f_back
    return "", ""


def is_the_projects(path: Path) -> bool:
    """Return whether a file is the project's own, even if the environment is in its folder."""
    installed = "site-packages" in path.parts
    return path.is_relative_to(ROOT) and not installed and path != Path(__file__)


def lines_of(frame) -> tuple[int, int]:
    positions = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    return positions[0], positions[1]


class LowerRight(tuple):
    """Stands in for torch.nn.attention.bias.CausalBias: a mask by name, (C, P + C)."""


def attend(query, key, value, attn_mask=None, is_causal=False, scale=None, **_):
    """Return attention by the kernel that torch picks on a GPU (aten's sdp_utils.cpp).

    That is flash attention without a mask or with torch's named lower-right mask, and the
    memory-efficient kernel with any other mask; the latter has no shared key heads. Raises
    `RuntimeError` if cuDNN's kernel is on: then nothing called `fastpath.prepare_gpu`.
    """
    if torch.backends.cuda.cudnn_sdp_enabled():
        raise RuntimeError("attention by cuDNN")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    inputs, causal = (query, key, value), is_causal or isinstance(attn_mask, LowerRight)
    if isinstance(attn_mask, LowerRight) and query.dtype == torch.float32:
        raise RuntimeError("flash attention has no fp32: torch would write out all scores")
    if attn_mask is None or isinstance(attn_mask, LowerRight):
        return aten._scaled_dot_product_flash_attention(*inputs, 0.0, causal, scale=scale)[0]
    if key.shape[1] != query.shape[1]:
        raise RuntimeError("a mask and shared key heads: torch would write out all scores")
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    with_gradient = torch.is_grad_enabled()
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(*inputs, attn_mask, with_gradient, scale=scale)[0]


def hidden_bytes(func, args) -> int:
    """Return the bytes that a kernel allocates besides its results.

    logsumexp allocates `self - max` and its exponentials (ReduceOps.cpp). Flash attention
    accumulates the gradient of the queries in fp32, with rows rounded up to 128, and holds key and
    value gradients for all query heads before it sums over those that share a key head
    (flash_api.cpp, mha_bwd).
    """
    if func is aten.logsumexp.default:
        return 2 * args[0].numel() * args[0].element_size()
    if func is aten._scaled_dot_product_flash_attention_backward.default:
        rows, heads, tokens, size = args[1].shape
        total = 4 * rows * heads * -(-tokens // 128) * 128 * size
        if args[2].shape[1] != heads:
            total += 2 * args[2].element_size() * rows * heads * args[2].shape[2] * size
        return total
    return 0


# --- torch.cuda, and what cannot run without a GPU --------------------------------------------


def of_cuda(gpu: PretendedGPU) -> dict:
    """Return the replacements for functions of torch.cuda."""
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: f"pretended GPU with {gpu.gib:.0f} GiB",
        "mem_get_info": gpu.free,
        "memory_allocated": lambda *_: gpu.allocated,
        "memory_reserved": lambda *_: gpu.allocated,
        "max_memory_allocated": lambda *_: gpu.peak,
        "reset_peak_memory_stats": gpu.reset_peak,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "current_stream": lambda *_: SimpleNamespace(device_index=0),
        "set_stream": lambda stream: None,
        "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": Graph,
        "graph": lambda graph, **options: capturing(gpu),
    }


def patches(gpu: PretendedGPU) -> list:
    """Return all patches that are in force while there is a pretended GPU."""
    accelerator = {
        "is_available": lambda: True,
        "current_accelerator": lambda *_, **__: torch.device("cuda"),
        "current_device_index": lambda: 0,
        "set_device_index": lambda index: None,
    }
    stock_save, save_file = torch.save, peft.peft_model.safe_save_file
    save_pretrained = Qwen2_5_VLForConditionalGeneration.save_pretrained
    adam, stock_attention = sys.modules["optimi.adam"], F.scaled_dot_product_attention

    def attention_of(query, *arguments, **options):
        return (attend if query.is_cuda else stock_attention)(query, *arguments, **options)

    return [
        # Module.to swaps parameters, as between CPU and GPU, so that tied ones stay tied
        mock.patch.object(torch.__future__, "_swap_module_params_on_conversion", True),
        mock.patch.object(F, "scaled_dot_product_attention", attention_of),
        mock.patch.multiple(torch.cuda, **of_cuda(gpu)),
        mock.patch.multiple(torch.accelerator, **accelerator),
        mock.patch.object(torch._C, "_cuda_endAllocateToPool", lambda *_: None, create=True),
        mock.patch.object(torch.Tensor, "pin_memory", pin_memory),
        mock.patch.object(torch, "Generator", HostGenerator),
        mock.patch.object(torch, "compile", lambda function, **options: function),
        mock.patch.object(attention, "causal_lower_right", lambda *shape: LowerRight(shape)),
        mock.patch.object(torch.compiler, "reset", lambda: None),
        mock.patch.object(
            Qwen2_5_VLForConditionalGeneration,
            "save_pretrained",
            lambda m, folder: save_pretrained(m, folder, state_dict=gpu.on_host(m.state_dict())),
        ),
        mock.patch.object(torch, "save", lambda x, *a, **o: stock_save(gpu.on_host(x), *a, **o)),
        mock.patch.object(
            peft.peft_model, "safe_save_file", lambda x, *a, **o: save_file(gpu.on_host(x), *a, **o)
        ),
        mock.patch.object(adam, "_default_to_triton", lambda params: params[0].is_cuda),
        mock.patch.object(adam, "_triton_adam", lambda params, *_, **__: None),
        mock.patch.object(optimi.optimizer, "HAS_TRITON", True),
        mock.patch.object(_foreach_utils, "_foreach_supported_types", [torch.Tensor, DeviceTensor]),
    ]


class Graph:
    """A CUDA graph; its replay computes nothing, like everything here."""

    def replay(self) -> None:
        pass


@contextmanager
def capturing(gpu: PretendedGPU):
    gpu.capturing = True
    try:
        yield
    finally:
        gpu.capturing = False


class HostGenerator(torch.Generator):
    """A host generator that accepts any device; on the GPU its numbers have no values."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.of_the_gpu = torch.device(device).type == "cuda"
        return made


def pin_memory(tensor: torch.Tensor, device=None) -> torch.Tensor:
    """Return the tensor in pinned memory, as aten's Memory.cpp makes it.

    It allocates a storage of the size that the tensor's strides require, and copies the tensor to
    it with these strides. So it refuses the same tensors as on a machine with a GPU.
    """
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in strides) if tensor.numel() else 0
    storage = torch.UntypedStorage(elements * tensor.element_size())
    pinned = torch.empty(0, dtype=tensor.dtype)
    pinned.set_(storage, 0, tensor.shape, tensor.stride())
    return pinned.copy_(tensor)


def reserved_bytes(history: list[tuple[int, int]], *, page: int = 20 * 2**20) -> int:
    """Return the peak of GPU memory that torch's allocator reserves for a history of allocations.

    Simulates expandable_segments: one range that grows by pages, best fit, and neighbors that
    merge when freed. `free` lists the free blocks as (size, start), sorted; `end` is the end of
    the range.
    """
    free, starts, ends, held, end = [], {}, {}, {}, 0  # starts, ends: of the free blocks

    def put(start: int, size: int) -> None:
        if start in ends:  # merge with the neighbor below
            below = ends.pop(start)
            take(below, start - below)
            start, size = below, size + start - below
        if start + size in starts:
            above = starts[start + size]
            take(start + size, above)
            size += above
        insort(free, (size, start))
        starts[start], ends[start + size] = size, start

    def take(start: int, size: int) -> None:
        free.pop(bisect_left(free, (size, start)))
        del starts[start]
        ends.pop(start + size, None)

    for number, size in history:
        if number < 0:
            put(*held.pop(-number))
            continue
        size = -(-max(size, 1) // 512) * 512
        at = bisect_left(free, (size, -1))
        if at == len(free):
            tail = ends.get(end, end)  # the free block at the end grows
            grown = -(-(size - (end - tail)) // page) * page
            if tail < end:
                take(tail, end - tail)
            put(tail, end - tail + grown)
            end += grown
            at = bisect_left(free, (size, -1))
        room, start = free[at]
        take(start, room)
        if room > size:
            put(start + size, room - size)
        held[number] = (start, size)
    return end
