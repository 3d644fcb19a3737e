"""A forecast of the memory and disk that a run needs, made before anything is loaded.

Sizes are bytes, computed from shapes for completions of the maximum length. Memory is that of a
step's peak: tensors freed before the peak do not count.
"""

import math
import shutil
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig

from engine.model_files import ModelError
from engine.scoring import HEADROOM, activation_bytes, logprobs_bytes
from engine.sizes import (
    DTYPES,
    GIB,
    free_memory,
    optimizer_copies,
    parameter_count,
    shape_config,
    trained_count,
)

TEXT_TOKENS = 129  # per prompt, with Qwen's vocabulary; 127 if the prompt asks for <think>
LIBRARIES = {"cuda": GIB, "cpu": 6 * GIB // 10}  # CUDA context; Python with torch and the others
FRAGMENTATION = 0.04  # of the rest: unusable in torch's allocator, at most, in simulated steps
# memory of a layer's backward pass / activations that the layer keeps: all weights, adapters
BACKWARD_FACTOR, BACKWARD_FACTOR_LORA = 1.3, 1.45
LORA_RANK = 32  # suggested where training all weights does not fit
SMALLER_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
RUNS_ANYWHERE = "To train on this machine: python main.py --preset tiny"
NO_ROOM = "Checkpoints that do not fit are skipped. Smaller: --no-save-optimizer (no resuming)"
NO_FEW_FLAGS = "none found"


@dataclass(frozen=True)
class Workload:
    """Everything that determines how much memory a run needs. Fields are named after the flags."""

    model: str
    device: str
    dtype: str
    prompts_per_step: int
    group_size: int
    max_new_tokens: int
    image_size: int
    micro_batch: int
    layers_to_checkpoint: int | None  # None: as few as memory allows
    reference: bool
    lora_rank: int = 0
    freeze_vision: bool = False
    processes: int = 1  # that split the prompts and shard the optimizer state

    @property
    def trains_all(self) -> bool:
        """Whether the run trains the weights themselves rather than adapters."""
        return self.lora_rank == 0

    @property
    def prompts_here(self) -> int:
        """Prompts per step on one process."""
        return self.prompts_per_step // self.processes

    @property
    def prompts_in_a_pass(self) -> int:
        """Prompts per backward pass."""
        return min(self.micro_batch, self.prompts_here)

    @property
    def cells_in_a_pass(self) -> int:
        """Completion tokens per backward pass, at most."""
        return self.prompts_in_a_pass * self.group_size * self.max_new_tokens

    @property
    def tokens_in_a_pass(self) -> int:
        """N: prompt and completion tokens per backward pass, at most."""
        return self.prompts_in_a_pass * self.prompt_tokens + self.cells_in_a_pass

    @property
    def config(self) -> Qwen2_5_VLConfig:
        """A config with the model's shape. Raises `ModelError`."""
        return config_of(self.model)

    @property
    def prompt_tokens(self) -> int:
        """P: text and visual tokens of a prompt. Four patches make one visual token."""
        side = self.image_size // (2 * self.config.vision_config.patch_size)
        return side**2 + TEXT_TOKENS


@dataclass(frozen=True)
class Estimate:
    """Bytes by name at a step's peak, and the stage of the backward pass where the peak is."""

    peak: str
    sizes: dict[str, int]

    @property
    def total(self) -> int:
        """The sum of all sizes, bytes."""
        return sum(self.sizes.values())


def estimate(workload: Workload, *, free: int | None) -> Estimate:
    """Return the memory forecast at a step's peak.

    Checkpoints as few decoder layers as `free` bytes allow (all of them if `free` is None), unless
    `workload` sets a number.
    """
    always = {**resident_bytes(workload), "vision tower": vision_bytes(workload)}
    libraries = LIBRARIES[workload.device]
    kept = kept_layers(workload, free, sum(always.values()) + libraries)
    peak, sizes = max(peaks(workload, kept).items(), key=lambda item: sum(item[1].values()))
    sizes = {**always, **sizes, "libraries": libraries}
    if workload.device == "cuda":
        sizes["gaps between tensors"] = int(FRAGMENTATION * sum(sizes.values()))
    return Estimate(peak, sizes)


def resident_bytes(workload: Workload) -> dict[str, int]:
    """Return the bytes, by name, that stay in memory from the first step to the last."""
    size = DTYPES[workload.dtype].itemsize
    weights = size * parameters_of(workload.model)
    return {
        "weights": weights,
        "optimizer": optimizer_copies(DTYPES[workload.dtype])
        * trained_bytes(workload)
        // workload.processes,
        "reference": weights * (workload.reference and workload.trains_all),
        "key-value cache": cache_bytes(workload),
    }


def minimum_bytes(workload: Workload) -> int:
    """Return the bytes in memory during the optimizer's update, counted exactly."""
    return sum(resident_bytes(workload).values()) + trained_bytes(workload)


def kept_layers(workload: Workload, free: int | None, taken: int) -> int:
    """Return how many decoder layers keep their activations: forecasts `layers_to_checkpoint`."""
    layers = workload.config.text_config.num_hidden_layers
    if workload.layers_to_checkpoint is not None:
        return max(0, layers - workload.layers_to_checkpoint)
    if free is None:
        return 0
    left = (1 - HEADROOM) * free - taken - earlier_gradients(workload) - head_bytes(workload)
    return min(layers, max(0, int(left / layer_bytes(workload))))


def peaks(workload: Workload, kept: int) -> dict[str, dict[str, int]]:
    """Return the bytes, by name, besides the resident ones, at each stage that can be the peak.

    The backward pass starts with the log-probs, runs through the layers from last to first (the
    first ones are recomputed), and ends in the embeddings and the vision tower. On the way,
    gradients replace activations; those of earlier micro-batches are in memory throughout.
    """
    text, layers = workload.config.text_config, workload.config.text_config.num_hidden_layers
    row = f"decoder layers, {layers - kept} of {layers} checkpointed"
    inputs = (layers - kept) * workload.tokens_in_a_pass * text.hidden_size
    inputs *= DTYPES[workload.dtype].itemsize
    activations, earlier = layer_bytes(workload), earlier_gradients(workload)
    live = int((BACKWARD_FACTOR if workload.trains_all else BACKWARD_FACTOR_LORA) * activations)
    whole, words = trained_bytes(replace(workload, freeze_vision=True)), vocabulary_bytes(workload)
    in_layers = whole - words * (1 if workload.config.tie_word_embeddings else 2)
    by_now = [words + in_layers * kept // layers, words + in_layers]  # first recomputed, last layer
    parts = {
        "of the log-probs": (earlier, head_bytes(workload), kept * activations + inputs),
        "of the first recomputed layer": (max(earlier, by_now[0]), 0, inputs + live),
        "of the first layer": (max(earlier, by_now[1]), 0, live),
        "of the embeddings": (whole + 2 * words, 0, 0),  # for prompts, for completions, their sum
        "of the vision tower": (trained_bytes(workload), 0, 0),
    }
    names = ("gradients", "log-probs", row)
    return {peak: dict(zip(names, sizes, strict=True)) for peak, sizes in parts.items()}


def trained_bytes(workload: Workload) -> int:
    """Return the bytes of the trained parameters, and so of their gradients."""
    count = trained_of(workload.model, workload.lora_rank, workload.freeze_vision)
    return DTYPES[workload.dtype].itemsize * count


def vocabulary_bytes(workload: Workload) -> int:
    """Return the bytes of one gradient of the embeddings: 0 if only adapters are trained."""
    text = workload.config.text_config
    count = text.vocab_size * text.hidden_size
    return DTYPES[workload.dtype].itemsize * count * workload.trains_all


def earlier_gradients(workload: Workload) -> int:
    """Return the bytes of the gradients of earlier micro-batches, or 0 if there are none."""
    several = workload.prompts_here > workload.prompts_in_a_pass
    return trained_bytes(replace(workload, freeze_vision=True)) * several  # the tower's are last


def head_bytes(workload: Workload) -> int:
    """Return the bytes that the log-probs need."""
    text = workload.config.text_config
    return logprobs_bytes(text, workload.cells_in_a_pass, trained=workload.trains_all)


def layer_bytes(workload: Workload) -> int:
    """Return the bytes of activations that a decoder layer keeps for the backward pass."""
    text, dtype, cells = (
        workload.config.text_config,
        DTYPES[workload.dtype],
        workload.cells_in_a_pass,
    )
    return activation_bytes(
        text, dtype, workload.tokens_in_a_pass, cells, trained=workload.trains_all
    )


@lru_cache
def config_of(model: str) -> Qwen2_5_VLConfig:
    """Return a config with a model's shape, cached."""
    return shape_config(model)


@lru_cache
def parameters_of(model: str) -> int:
    """Return the number of parameters of a model."""
    return parameter_count(config_of(model))


@lru_cache
def trained_of(model: str, lora_rank: int, freeze_vision: bool) -> int:
    """Return the number of trained parameters."""
    return trained_count(config_of(model), lora_rank=lora_rank, freeze_vision=freeze_vision)


def cache_bytes(workload: Workload) -> int:
    """Return the bytes of all rows' keys and values, which the sampler keeps between steps."""
    text, rows = workload.config.text_config, workload.prompts_here * workload.group_size
    slots = -(-(workload.prompt_tokens + workload.max_new_tokens) // 8) * 8
    head_size = text.hidden_size // text.num_attention_heads
    per_slot = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size
    return rows * slots * per_slot * DTYPES[workload.dtype].itemsize


def vision_bytes(workload: Workload) -> int:
    """Return the bytes of activations that the vision tower keeps for a step's backward pass."""
    if workload.freeze_vision or not workload.trains_all:
        return 0
    vision = workload.config.vision_config
    patches = workload.prompts_here * (workload.image_size // vision.patch_size) ** 2
    each = int(4 * vision.intermediate_size + 15.5 * vision.hidden_size)  # as in decoder layers
    return vision.depth * patches * each * DTYPES[workload.dtype].itemsize


def flags_that_fit(workload: Workload, free: int) -> str | None:
    """Return the fewest flags that make `workload` fit into `free` bytes; None if none do.

    Cheap changes come first: smaller passes keep the gradient, a smaller group changes the run, and
    another model is the last resort.
    """
    changes = {
        "--micro-batch 1": {"micro_batch": 1, "layers_to_checkpoint": None},
        "--max-new-tokens 256": {"max_new_tokens": min(256, workload.max_new_tokens)},
        "--group-size 4": {"group_size": min(4, workload.group_size)},
        "--beta 0": {"reference": False},
        f"--lora-rank {LORA_RANK}": {"lora_rank": workload.lora_rank or LORA_RANK},
        f"--model {SMALLER_MODEL}": {"model": SMALLER_MODEL},
    }
    useful = [flag for flag, change in changes.items() if replace(workload, **change) != workload]
    for count in range(1, len(useful) + 1):
        for flags in combinations(useful, count):
            smaller = workload
            for flag in flags:
                smaller = replace(smaller, **changes[flag])
            if estimate(smaller, free=None).total <= free:
                return " ".join(flags)
    return None


def memory_table(found: Estimate) -> str:
    """Return the stage of the peak, then the sizes and their sum, one per line."""
    sizes = {name: size for name, size in found.sizes.items() if size}
    sizes["total"] = found.total
    lines = [f"  {name:<40}{size / GIB:>9.2f} GiB" for name, size in sizes.items()]
    return "\n".join([f"  at the gradient {found.peak}:", *lines])


# --- messages to the user -------------------------------------------------------------------


@dataclass(frozen=True)
class DiskNeeds:
    """Disk space that a run needs, bytes. As a string: one line for the user."""

    checkpoint: int
    checkpoints: int  # on disk at once
    final: int
    free: int

    @property
    def has_room(self) -> bool:
        """Whether all of it fits on the disk."""
        return self.checkpoints * self.checkpoint + self.final <= self.free

    def __str__(self) -> str:
        text = (
            f"Disk: {self.checkpoint / GIB:.2f} GiB per checkpoint, up to {self.checkpoints} at "
            f"once, and {self.final / GIB:.2f} GiB for final/; {self.free / GIB:.2f} GiB are free"
        )
        return text if self.has_room else f"{text}. {NO_ROOM}"


def print_needs(workload: Workload, disk: DiskNeeds) -> bool:
    """Print the memory and disk that a run needs; return whether this machine has the memory."""
    has_device = workload.device == "cpu" or torch.cuda.is_available()
    free = free_memory(torch.device(workload.device))[0] if has_device else 0
    found = estimate(workload, free=free)
    print(
        f"{workload.model} in {workload.dtype} on {workload.device}: {workload.prompts_per_step} "
        f"prompts x {workload.group_size} completions of up to {workload.max_new_tokens} tokens, "
        f"{workload.prompts_in_a_pass} prompts per backward pass"
        + (f" on each of {workload.processes} processes" if workload.processes > 1 else "")
    )
    print(memory_table(found))
    print(f"  {'free':<40}" + (f"{free / GIB:>9.2f} GiB" if has_device else "   no CUDA GPU found"))
    print(disk)
    if has_device and found.total <= free:
        print("It fits.")
    elif has_device:
        print(
            f"It does not fit. Flags that make it fit: "
            f"{flags_that_fit(workload, free) or NO_FEW_FLAGS}"
        )
    else:
        print(f"It needs a CUDA GPU with {math.ceil(found.total / GIB)} GiB free. {RUNS_ANYWHERE}")
    return has_device and found.total <= free


def check_memory(workload: Workload) -> None:
    """Raise `ModelError` if the exact minimum does not fit; warn if only the estimate does not."""
    free, _ = free_memory(torch.device(workload.device))
    about, at_least = estimate(workload, free=free).total, minimum_bytes(workload)
    if about <= free:
        return
    flags = flags_that_fit(workload, free) or NO_FEW_FLAGS
    rest = (
        f"GiB; {free / GIB:.1f} GiB are free on {workload.device}. Flags that make it fit: {flags}"
    )
    if at_least > free:
        raise ModelError(f"this run needs at least {at_least / GIB:.1f} {rest}")
    print(f"This run needs about {about / GIB:.1f} {rest}")


def flags_for_less(workload: Workload) -> str:
    """Return the flags that would save a tenth of the memory, for a run that has run out of it."""
    workload = replace(workload, micro_batch=1)  # the run has tried smaller passes
    found = estimate(workload, free=None)
    tenth = (found.total - found.sizes["libraries"]) // 10
    return flags_that_fit(workload, found.total - tenth) or NO_FEW_FLAGS


def disk_needs(
    workload: Workload,
    place: Path,
    *,
    steps: int,
    save_every: int,
    keep: int,
    merge: bool,
    with_optimizer: bool,
    with_reference: bool,
) -> DiskNeeds:
    """Return the disk space that a run needs at `place`, which may not exist yet, and has free."""
    sizes = resident_bytes(workload)
    saved = trained_bytes(workload) if workload.lora_rank else sizes["weights"]
    each = saved + with_optimizer * sizes["optimizer"] * workload.processes
    each += with_reference * sizes["weights"]
    final = saved + merge * sizes["weights"]
    saves = math.ceil(steps / save_every) if save_every else 1
    at_once = min(keep + 1, saves)  # the oldest is deleted once the new one is complete
    folders = (place.absolute(), *place.absolute().parents)
    free = shutil.disk_usage(next(folder for folder in folders if folder.exists())).free
    return DiskNeeds(each, at_once, final, free)
