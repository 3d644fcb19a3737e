"""What a run takes of memory and of the disk, told before anything is loaded.

Sizes are bytes, counted from shapes for the longest completions that are allowed, at the moment of
a step when they are largest together: what is gone by then is not in them.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations

from transformers import Qwen2_5_VLConfig

from engine.scoring import HEADROOM, activation_bytes, logprobs_bytes
from engine.sizes import DTYPES, GIB, optimizer_copies, parameter_count, shape_config, trained_count

TEXT_TOKENS = 129  # of a prompt, with Qwen's vocabulary; 127 of one that asks for <think>
LIBRARIES = {"cuda": GIB, "cpu": 6 * GIB // 10}  # CUDA context; Python with torch and the others
GAPS = 0.04  # of the rest: what torch's allocator holds and cannot use, at most, in simulated steps
LIVE, LIVE_ADAPTED = 1.3, 1.45  # in a layer's backward pass, times what the layer keeps for it
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
    def cells_in_a_pass(self) -> int:
        """Completion tokens of one backward pass, as many as there may be."""
        return self.prompts_in_a_pass * self.group_size * self.max_new_tokens

    @property
    def tokens_in_a_pass(self) -> int:
        """N: of prompts and completions."""
        return self.prompts_in_a_pass * self.prompt_tokens + self.cells_in_a_pass

    @property
    def config(self) -> Qwen2_5_VLConfig:
        """The model's shape. Raises `ModelError`."""
        return config_of(self.model)

    @property
    def prompt_tokens(self) -> int:
        """P: four patches make a visual token."""
        side = self.image_size // (2 * self.config.vision_config.patch_size)
        return side**2 + TEXT_TOKENS


@dataclass(frozen=True)
class Estimate:
    """What takes how many bytes, by name, at the moment when it is most."""

    moment: str
    sizes: dict[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.sizes.values())


def estimate(work: Work, *, free: int | None) -> Estimate:
    """Return what takes how much at a step's peak.

    As many decoder layers as `free` bytes allow are kept for the backward pass, and the others
    checkpointed, unless `work` names a number; with None all are.
    """
    always = {**held(work), "vision tower": vision_bytes(work)}
    libraries = LIBRARIES[work.device]
    kept = kept_layers(work, free, sum(always.values()) + libraries)
    moment, sizes = max(moments(work, kept).items(), key=lambda item: sum(item[1].values()))
    sizes = {**always, **sizes, "libraries": libraries}
    if work.device == "cuda":
        sizes["gaps between tensors"] = int(GAPS * sum(sizes.values()))
    return Estimate(moment, sizes)


def held(work: Work) -> dict[str, int]:
    """Return what is in memory from the first step to the last."""
    size = DTYPES[work.dtype].itemsize
    weights = size * parameters_of(work.model)
    return {
        "weights": weights,
        "optimizer": optimizer_copies(DTYPES[work.dtype]) * trained_bytes(work) // work.processes,
        "reference": weights * (work.reference and work.trains_all),
        "key-value cache": cache_bytes(work),
    }


def at_least(work: Work) -> int:
    """Return what is in memory together when the weights are updated: counted exactly."""
    return sum(held(work).values()) + trained_bytes(work)


def kept_layers(work: Work, free: int | None, taken: int) -> int:
    """Return how many decoder layers keep their activations: `layers_to_checkpoint` foreseen."""
    layers = work.config.text_config.num_hidden_layers
    if work.layers_to_checkpoint is not None:
        return max(0, layers - work.layers_to_checkpoint)
    if free is None:
        return 0
    left = (1 - HEADROOM) * free - taken - earlier_gradients(work) - head_bytes(work)
    return min(layers, max(0, int(left / layer_bytes(work))))


def moments(work: Work, kept: int) -> dict[str, dict[str, int]]:
    """Return what takes how much beside the rest, at each moment when it could be most.

    The backward pass begins with the log-probs, goes through the layers from the last to the first,
    the first ones recomputed, and ends in the embeddings and the tower. Gradients take the place of
    activations; of earlier micro-batches they are there all the time.
    """
    text, layers = work.config.text_config, work.config.text_config.num_hidden_layers
    row = f"decoder layers, {layers - kept} of {layers} checkpointed"
    inputs = (layers - kept) * work.tokens_in_a_pass * text.hidden_size
    inputs *= DTYPES[work.dtype].itemsize
    activations, earlier = layer_bytes(work), earlier_gradients(work)
    live = int((LIVE if work.trains_all else LIVE_ADAPTED) * activations)
    whole, words = trained_bytes(replace(work, freeze_vision=True)), vocabulary_bytes(work)
    in_layers = whole - words * (1 if work.config.tie_word_embeddings else 2)
    by_now = [words + in_layers * kept // layers, words + in_layers]  # at the first, the last
    parts = {
        "of the log-probs": (earlier, head_bytes(work), kept * activations + inputs),
        "of the first layer that runs again": (max(earlier, by_now[0]), 0, inputs + live),
        "of the first layer": (max(earlier, by_now[1]), 0, live),
        "of the embeddings": (whole + 2 * words, 0, 0),  # prompts' and completions', and their sum
        "of the vision tower": (trained_bytes(work), 0, 0),
    }
    names = ("gradients", "log-probs", row)
    return {moment: dict(zip(names, sizes, strict=True)) for moment, sizes in parts.items()}


def trained_bytes(work: Work) -> int:
    """Return the bytes of what is trained, and so of its gradients."""
    count = trained_of(work.model, work.lora_rank, work.freeze_vision)
    return DTYPES[work.dtype].itemsize * count


def vocabulary_bytes(work: Work) -> int:
    """Return the bytes of a gradient of the vocabulary: none if only adapters are trained."""
    text = work.config.text_config
    count = text.vocab_size * text.hidden_size
    return DTYPES[work.dtype].itemsize * count * work.trains_all


def earlier_gradients(work: Work) -> int:
    """Return the bytes of gradients that a pass finds: those of the micro-batches before it."""
    several = work.prompts_here > work.prompts_in_a_pass
    return trained_bytes(replace(work, freeze_vision=True)) * several  # the tower's come last


def head_bytes(work: Work) -> int:
    """Return the bytes that log-probs take for themselves."""
    text = work.config.text_config
    return logprobs_bytes(text, work.cells_in_a_pass, trained=work.trains_all)


def layer_bytes(work: Work) -> int:
    """Return the bytes that a decoder layer keeps of a pass for its gradient."""
    text, dtype, cells = work.config.text_config, DTYPES[work.dtype], work.cells_in_a_pass
    return activation_bytes(text, dtype, work.tokens_in_a_pass, cells, trained=work.trains_all)


@lru_cache
def config_of(model: str) -> Qwen2_5_VLConfig:
    """Return a model's shape; it is asked for often."""
    return shape_config(model)


@lru_cache
def parameters_of(model: str) -> int:
    """Return a model's number of parameters."""
    return parameter_count(config_of(model))


@lru_cache
def trained_of(model: str, lora_rank: int, freeze_vision: bool) -> int:
    """Return how many parameters are trained."""
    return trained_count(config_of(model), lora_rank=lora_rank, freeze_vision=freeze_vision)


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
    each = int(4 * vision.intermediate_size + 15.5 * vision.hidden_size)  # as decoder layers' are
    return vision.depth * patches * each * DTYPES[work.dtype].itemsize


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
            if estimate(smaller, free=None).total <= free:
                return " ".join(flags)
    return None


def table(found: Estimate) -> str:
    """Return the sizes and their sum, one per line."""
    sizes = {name: size for name, size in found.sizes.items() if size}
    sizes["total"] = found.total
    lines = [f"  {name:<40}{size / GIB:>9.2f} GiB" for name, size in sizes.items()]
    return "\n".join([f"  at the gradient {found.moment}:", *lines])
