"""Everything that knows Qwen2.5-VL and transformers: load, encode, generate, score.

Dimensions are those of the legend in grpo.py: Q prompts of P tokens, G completions each, B = Q*G
rows (group-major) of C completion tokens, V vocabulary. All prompts of a call are equally long
(one text, one image size), so nothing is padded on the left and no attention mask is needed: what
is padded stands to the right of everything that looks at it.

Positions are 3-D in this model (M-RoPE: time, height, width). They are built once per prompt and
passed explicitly, because transformers otherwise falls back to 1-D positions, or to hidden state
left by the previous call.
"""

import copy
import logging
import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoProcessor,
    DynamicCache,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

MODEL_TYPE = "qwen2_5_vl"
HUB_PARAMETERS = {  # so that a machine too small is told before anything is downloaded
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
}
LARGEST_ON_CPU = 1_000_000_000  # parameters; a larger model is refused without a GPU
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNMASKED = {"full_attention": None}  # attention is causal and nothing else is hidden
FINISHED_CHECK_EVERY = 8  # tokens between two looks at whether all rows have ended
SCORE_CHUNK = 1024  # completion tokens whose logits over the vocabulary are in memory at once
GIB = 2**30


class ModelError(Exception):
    """A model that cannot be used here. The message is one line for the user."""


# --- loading ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """The policy, its frozen copy (None when it is not needed) and what turns text into tokens."""

    policy: Qwen2_5_VLForConditionalGeneration
    reference: Qwen2_5_VLForConditionalGeneration | None
    processor: object


def load(model: str, *, device: str, dtype: str, reference: bool = False) -> Loaded:
    """Return the model of a folder or hub id, in `dtype` on `device`. Raises `ModelError`.

    The dtype is passed to the loader: `model.to(bfloat16)` would round the rotary frequencies as
    well.
    """
    model_config(model)
    try:
        processor = AutoProcessor.from_pretrained(model)
        policy = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model, dtype=DTYPES[dtype], use_safetensors=True
        )
    except Exception as error:  # whatever a damaged folder or a lost connection makes it raise
        raise ModelError(f"model {model}: cannot be loaded: {first_line(error)}") from error
    policy.to(device).eval()
    frozen = copy.deepcopy(policy).requires_grad_(False) if reference else None
    return Loaded(policy, frozen, processor)


def enable_checkpointing(model) -> None:
    """Make training passes keep only each layer's input and recompute the rest in backward."""
    new_name = "activation_checkpointing_enable"  # newer releases of transformers
    enable = getattr(model, new_name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def model_config(model: str) -> Qwen2_5_VLConfig:
    """Return the config of a folder or hub id. Raises `ModelError` if it is not Qwen2.5-VL."""
    owner = model.split("/")[0]
    is_hub_id = model.count("/") == 1 and owner not in ("", ".", "..", "~")
    if not os.path.isdir(model) and (not is_hub_id or os.path.isdir(owner)):
        raise ModelError(f"model {model}: no such folder, and not a hub id like Qwen/NAME")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each retry
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:
        where = "in this folder" if os.path.isdir(model) else "on disk or on the hub"
        raise ModelError(
            f"model {model}: no readable model {where}: {first_line(error)}"
        ) from error
    if config.model_type != MODEL_TYPE:
        raise ModelError(f"model {model}: is a {config.model_type} model, not {MODEL_TYPE}")
    return config


def parameter_count(model: str) -> int:
    """Return the number of parameters without loading one. Raises `ModelError`."""
    if model in HUB_PARAMETERS:
        return HUB_PARAMETERS[model]
    config = model_config(model)
    with torch.device("meta"):
        empty = Qwen2_5_VLForConditionalGeneration(config)
    return sum(parameter.numel() for parameter in empty.parameters())


def place(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    training: bool = False,
    reference: bool = False,
    command_that_runs: str,
) -> tuple[str, str]:
    """Return the device and dtype to load the model with, in place of "auto".

    Raises `ModelError` where this machine cannot hold it; nothing is downloaded to find that out.
    """
    count = parameter_count(model)
    found_gpu = torch.cuda.is_available()
    runs_here = f"What runs on this machine: {command_that_runs}"
    wanted = device
    if device == "auto":
        device = "cuda" if found_gpu or count > LARGEST_ON_CPU else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    needed = count * bytes_per_parameter(dtype, training=training, reference=reference)
    purpose = "to train, activations not counted" if training else "to run"
    size = f"{count / 1e9:.2f} billion" if count > 1e8 else f"{count / 1e6:.1f} million"
    asks = f"{model} ({size} parameters) needs {needed / GIB:.1f} GiB {purpose}"
    if device == "cuda" and not found_gpu:
        flag = "" if wanted == "auto" else "--device cuda: "
        raise ModelError(f"{flag}{asks}, on a CUDA GPU; found: no CUDA GPU. {runs_here}")
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else free_ram()
    if needed > free:
        raise ModelError(f"{asks}; found: {free / GIB:.1f} GiB free on {device}. {runs_here}")
    return device, dtype


def bytes_per_parameter(dtype: str, *, training: bool, reference: bool) -> int:
    """Return what a parameter occupies: its weight; in training also gradient and two moments.

    bf16 training keeps a Kahan compensation as well; a reference is one more copy of the weights.
    """
    size = 2 if dtype == "bfloat16" else 4
    copies = 1 if not training else 5 if dtype == "bfloat16" else 4
    return size * (copies + reference)


def free_ram() -> int:
    """Return the bytes of main memory that can still be used."""
    try:
        with open("/proc/meminfo") as lines:
            kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return kib * 1024
    except (OSError, StopIteration):  # not Linux: count all of it
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, for messages that must be one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def stop_ids(model) -> list[int]:
    """Return all token ids that end a completion: Qwen's chat models have two."""
    ids = model.generation_config.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids)


# --- prompts ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """Model inputs of Q prompts with one image each; `prompts[a:b]` are some of them."""

    input_ids: Tensor  # (Q, P)
    mm_token_type_ids: Tensor  # (Q, P), 1 where an image token stands
    pixel_values: Tensor  # (Q, patches, values per patch)
    image_grid_thw: Tensor  # (Q, 3): patches in time, height, width

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice) -> "Prompts":
        return Prompts(
            self.input_ids[rows],
            self.mm_token_type_ids[rows],
            self.pixel_values[rows],
            self.image_grid_thw[rows],
        )


def encode(
    processor, images: list[Image.Image], *, system: str, prompt: str, device: str
) -> Prompts:
    """Return model inputs, once per image: all images of one size, all with the same question."""
    chats = [
        [
            {"role": "system", "content": system},
            {
                "role": "user",
                "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}],
            },
        ]
        for image in images
    ]
    text = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    pictures, _ = process_vision_info(chats)
    batch = processor(text=text, images=pictures, padding=True, return_tensors="pt")
    if not batch["attention_mask"].all():
        raise ValueError("prompts differ in length: all images of a call must have one size")
    return Prompts(
        batch["input_ids"].to(device),
        batch["mm_token_type_ids"].to(device),
        batch["pixel_values"].unflatten(0, (len(images), -1)).to(device),
        batch["image_grid_thw"].to(device),
    )


def embed_prompts(model, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings (Q, P, hidden), positions (3, Q, P), first completion positions (Q, 1).

    The vision tower reads each image once. Completion token t stands at `first + t` on all three
    axes: the image's 2-D block takes fewer positions than it has tokens, so `first` is below P.
    """
    core = model.model
    embeds = core.get_input_embeddings()(prompts.input_ids)
    images = core.get_image_features(prompts.pixel_values.flatten(0, 1), prompts.image_grid_thw)
    visual = torch.cat(list(images.pooler_output)).to(embeds.dtype)  # (visual tokens, hidden)
    is_image = prompts.input_ids == core.config.image_token_id
    embeds = embeds.masked_scatter(is_image[..., None].expand_as(embeds), visual)
    positions, delta = core.get_rope_index(
        prompts.input_ids, prompts.mm_token_type_ids, image_grid_thw=prompts.image_grid_thw
    )
    return embeds, positions, prompts.input_ids.shape[1] + delta


# --- sampling ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Completions:
    """What was sampled. Tokens after a row's first stop token are padding and not in the mask."""

    ids: Tensor  # (B, C)
    mask: Tensor  # (B, C) bool; the stop token belongs to the completion
    logprobs: Tensor  # (B, C) fp32, under the distribution the token was drawn from
    truncated: Tensor  # (B,) bool: reached the limit without a stop token


@torch.no_grad()
def generate(
    model,
    prompts: Prompts,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    pad_id: int,
    generator: torch.Generator | None,
) -> Completions:
    """Return G completions of each prompt, all rows decoded together; temperature 0 is greedy.

    Tokens are drawn from softmax(logits / temperature) and nothing else: no top-k, no top-p, no
    penalties, whatever the checkpoint's generation_config says. Each prompt is read once; its
    keys and values are then handed to its G rows.
    """
    language_model = model.model.language_model
    stops = torch.tensor(stop_ids(model), device=model.device)
    vocabulary = at_least_fp32(model.lm_head.weight)  # (V, hidden)
    hidden, cache, next_position = read_prompts(model, prompts, group_size)

    finished = torch.zeros(len(hidden), 1, dtype=torch.bool, device=hidden.device)
    ids, logprobs, mask = [], [], []
    for drawn in range(1, max_new_tokens + 1):
        token, logprob = draw(logits_of(hidden[:, 0], vocabulary), temperature, generator)
        ids.append(token.masked_fill(finished, pad_id))
        logprobs.append(logprob.masked_fill(finished, 0.0))
        mask.append(~finished)
        finished = finished | torch.isin(ids[-1], stops)
        if drawn == max_new_tokens:
            break
        if drawn % FINISHED_CHECK_EVERY == 0 and finished.all():  # host sync
            break
        position = (next_position + drawn - 1).expand(3, -1, -1)
        hidden = decode(language_model, language_model.embed_tokens(ids[-1]), position, cache)
    length = int(torch.cat(mask, 1).sum(1).max())  # host sync
    return Completions(
        ids=torch.cat(ids, 1)[:, :length],
        mask=torch.cat(mask, 1)[:, :length],
        logprobs=torch.cat(logprobs, 1)[:, :length],
        truncated=~finished[:, 0],
    )


def read_prompts(model, prompts: Prompts, group_size: int) -> tuple[Tensor, DynamicCache, Tensor]:
    """Return last states (B, 1, hidden), cache, next positions (B, 1); reads each prompt once."""
    model.eval()  # in training mode, checkpointing would silently drop the cache
    embeds, positions, next_position = embed_prompts(model, prompts)
    cache = DynamicCache(config=model.config.text_config)
    hidden = decode(model.model.language_model, embeds, positions, cache)[:, -1:]
    if cache.get_seq_length() != embeds.shape[1]:
        raise RuntimeError("the prompts left no key-value cache: sampling would ignore them")
    cache.batch_repeat_interleave(group_size)
    return (
        hidden.repeat_interleave(group_size, 0),
        cache,
        next_position.repeat_interleave(group_size, 0),
    )


def make_generator(device: str, *numbers: int) -> torch.Generator:
    """Return random numbers that are a function of some numbers, such as seed and step, alone."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1)
    return torch.Generator(device).manual_seed(int(state))


def decode(language_model, embeds: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """Return the hidden states of more tokens, (rows, tokens, hidden); extends the cache."""
    return language_model(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=UNMASKED,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


def draw(
    logits: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return one token per row of logits (B, V) and its log-prob, both (B, 1).

    The Gumbel-max trick: argmax(logits - log E) with E ~ Exp(1) is a sample of softmax(logits),
    without a cumulative sum and without a host sync.
    """
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    else:
        logits = logits / temperature
        noise = torch.empty_like(logits).exponential_(generator=generator).log()
        token = (logits - noise).argmax(-1, keepdim=True)
    return token, logits.log_softmax(-1).gather(-1, token)


def completion_texts(processor, completions: Completions, stops: list[int]) -> list[str]:
    """Return the text of each row, exactly as sampled, without its stop token."""
    return [
        processor.tokenizer.decode([token for token in row[mask].tolist() if token not in stops])
        for row, mask in zip(completions.ids.cpu(), completions.mask.cpu(), strict=True)
    ]


# --- scoring ----------------------------------------------------------------------------


def completion_logprobs(
    model, prompts: Prompts, completion_ids: Tensor, completion_mask: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of every completion token and its distribution's entropy, (B, C) each.

    Under softmax(logits / temperature) in fp32, zero where the mask is false. Differentiable where
    gradients are enabled, through the vision tower; the entropy never is. Rows are group-major.
    """
    model.train(torch.is_grad_enabled())  # gradient checkpointing works in training mode only
    language_model = model.model.language_model
    group_size = len(completion_ids) // len(prompts)
    embeds, positions, first = (
        embeds_q.repeat_interleave(group_size, dim)
        for embeds_q, dim in zip(embed_prompts(model, prompts), (0, 1, 0), strict=True)
    )
    prompt_length = embeds.shape[1]
    embeds = torch.cat([embeds, language_model.embed_tokens(completion_ids)], 1)  # (B, P+C, hidden)
    offsets = torch.arange(completion_ids.shape[1], device=embeds.device)
    positions = torch.cat([positions, (first + offsets).expand(3, -1, -1)], 2)  # (3, B, P+C)
    hidden = language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=UNMASKED, use_cache=False
    ).last_hidden_state
    predicts = hidden[:, prompt_length - 1 : -1]  # (B, C, hidden): the state before each token
    logprobs, entropy = token_logprobs(
        predicts[completion_mask],
        model.lm_head.weight,
        completion_ids[completion_mask],
        temperature,
    )
    empty = logprobs.new_zeros(completion_ids.shape)
    return (
        empty.masked_scatter(completion_mask, logprobs),
        empty.masked_scatter(completion_mask, entropy),
    )


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log softmax(hidden @ weight.T / temperature)[target] and the entropy, (tokens,) each.

    Logits are fp32 (bf16 would put errors of up to 0.06 on a log-prob) and V is 152,064 for the 7B
    model, so they are made for one chunk of tokens at a time and again in the backward pass.
    """
    weight = at_least_fp32(weight)
    parts = [
        checkpoint(chunk_logprobs, chunk, weight, chunk_targets, temperature, use_reentrant=False)
        for chunk, chunk_targets in zip(
            hidden.split(SCORE_CHUNK), targets.split(SCORE_CHUNK), strict=True
        )
    ]
    logprobs, entropy = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def chunk_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return `token_logprobs` of one chunk; weight (V, hidden) in at least fp32."""
    logprobs = (logits_of(hidden, weight) / temperature).log_softmax(-1)  # (tokens, V)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return logits (tokens, V) from hidden states (tokens, hidden), in the weight's precision."""
    return hidden.to(weight.dtype) @ weight.T


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32, or in fp64 if it is fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
