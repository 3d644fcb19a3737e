"""What a run takes of memory and of the disk, told before anything is loaded.

Sizes are bytes, counted from shapes for the longest completions that are allowed. What a kernel
needs for itself, and what an allocator cannot use again, is not in them.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations

from transformers import Qwen2_5_VLConfig

from policy import DTYPES, GIB, optimizer_copies, parameter_count, shape_config, trained_count
from scoring import CHUNK, HEADROOM, activation_bytes

TEXT_TOKENS = 200  # of a prompt: a little more than it has with Qwen's vocabulary
LIBRARIES = {"cuda": GIB, "cpu": 6 * GIB // 10}  # CUDA context; Python with torch and the others
EXACT = ("weights", "gradients", "optimizer", "reference", "key-value cache")  # of `estimate`
LORA_RANK = 32  # proposed where training all weights does not fit
SMALLER_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"


@dataclass(frozen=True)
class Work:
    """What decides how much memory a run takes; fields are named as the flags are."""

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
    processes: int = 1  # prompts and optimizer are shared out to

    @property
    def trains_all(self) -> bool:
        """Whether the weights themselves are trained, and not adapters beside them."""
        return self.lora_rank == 0

    @property
    def prompts_here(self) -> int:
        """Prompts of a step that one process has."""
        return self.prompts_per_step // self.processes

    @property
    def prompts_in_a_pass(self) -> int:
        """Prompts of one backward pass."""
        return min(self.micro_batch, self.prompts_here)

    @property
    def config(self) -> Qwen2_5_VLConfig:
        """The model's shape. Raises `ModelError`."""
        return shape_config(self.model)

    @property
    def prompt_tokens(self) -> int:
        """P: four patches make a visual token."""
        side = self.image_size // (2 * self.config.vision_config.patch_size)
        return side**2 + TEXT_TOKENS


def estimate(work: Work, *, free: int | None) -> dict[str, int]:
    """Return what takes how many bytes at a step's peak, by name.

    As many decoder layers as `free` bytes allow are kept for the backward pass, and the others
    checkpointed, unless `work` names a number; with None all are.
    """
    text = work.config.text_config
    size, layers = DTYPES[work.dtype].itemsize, text.num_hidden_layers
    parameters = parameters_of(work.model) * size
    trained = trained_of(work.model, work.lora_rank, work.freeze_vision) * size
    tokens = work.prompts_in_a_pass * (work.prompt_tokens + work.group_size * work.max_new_tokens)
    sizes = {
        "weights": parameters,
        "gradients": trained,
        "optimizer": optimizer_copies(DTYPES[work.dtype]) * trained // work.processes,
        "reference": parameters * (work.reference and work.trains_all),
        "key-value cache": cache_bytes(work),
        "vision tower": vision_bytes(work),
        "log-probs": logits_bytes(work),
        "libraries": LIBRARIES[work.device],
    }
    per_layer = tokens * activation_bytes(text, DTYPES[work.dtype])
    checkpointed = work.layers_to_checkpoint
    if checkpointed is None:
        left = 0 if free is None else (1 - HEADROOM) * free - sum(sizes.values()) - per_layer
        checkpointed = max(0, layers - max(0, int(left / per_layer)))
    checkpointed = min(checkpointed, layers)
    inputs = checkpointed * tokens * text.hidden_size * size
    live = 1 if checkpointed else 0  # the layer that is being recomputed
    name = f"decoder layers, {checkpointed} of {layers} checkpointed"
    return {**sizes, name: inputs + (layers - checkpointed + live) * per_layer}


@lru_cache
def parameters_of(model: str) -> int:
    """Return a model's number of parameters; it is asked for often."""
    return parameter_count(shape_config(model))


@lru_cache
def trained_of(model: str, lora_rank: int, freeze_vision: bool) -> int:
    """Return how many parameters are trained."""
    return trained_count(shape_config(model), lora_rank=lora_rank, freeze_vision=freeze_vision)


def cache_bytes(work: Work) -> int:
    """Return the bytes of all rows' keys and values, which the sampler keeps from step to step."""
    text, rows = work.config.text_config, work.prompts_here * work.group_size
    slots = -(-(work.prompt_tokens + work.max_new_tokens) // 8) * 8
    head_size = text.hidden_size // text.num_attention_heads
    per_slot = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size
    return rows * slots * per_slot * DTYPES[work.dtype].itemsize


def vision_bytes(work: Work) -> int:
    """Return the bytes that the vision tower keeps of a step for the backward pass."""
    if work.freeze_vision or not work.trains_all:
        return 0
    vision = work.config.vision_config
    patches = work.prompts_here * (work.image_size // vision.patch_size) ** 2
    return vision.depth * patches * activation_bytes(vision, DTYPES[work.dtype])


def logits_bytes(work: Work) -> int:
    """Return the bytes of fp32 logits: of sampling, or of a scoring pass with its gradient."""
    text = work.config.text_config
    rows = work.prompts_here * work.group_size
    sampling = (2 + work.processes) * rows * text.vocab_size  # noise is made for all processes
    gradient = text.vocab_size * text.hidden_size if work.trains_all else 0
    scoring = 3 * CHUNK * text.vocab_size + gradient
    return 4 * max(sampling, scoring)


def what_would_fit(work: Work, free: int) -> str | None:
    """Return the fewest flags with which `work` fits into `free` bytes; None if none help.

    Those that cost least come first: the gradient stays the same with smaller passes, the run is
    another one with a smaller group, and another model is the last resort.
    """
    changes = {
        "--micro-batch 1": {"micro_batch": 1, "layers_to_checkpoint": None},
        "--max-new-tokens 256": {"max_new_tokens": min(256, work.max_new_tokens)},
        "--group-size 4": {"group_size": min(4, work.group_size)},
        "--beta 0": {"reference": False},
        f"--lora-rank {LORA_RANK}": {"lora_rank": work.lora_rank or LORA_RANK},
        f"--model {SMALLER_MODEL}": {"model": SMALLER_MODEL},
    }
    useful = [flag for flag, change in changes.items() if replace(work, **change) != work]
    for count in range(1, len(useful) + 1):
        for flags in combinations(useful, count):
            smaller = work
            for flag in flags:
                smaller = replace(smaller, **changes[flag])
            if sum(estimate(smaller, free=None).values()) <= free:
                return " ".join(flags)
    return None


def table(sizes: dict[str, int]) -> str:
    """Return the sizes and their sum, one per line."""
    lines = [f"  {name:<40}{size / GIB:>9.2f} GiB" for name, size in sizes.items()]
    return "\n".join([*lines, f"  {'total':<40}{sum(sizes.values()) / GIB:>9.2f} GiB"])
