"""Everything that knows Qwen2.5-VL and its checkpoints: load, place, encode, embed.

Letters are those of the legend in grpo.py. All prompts of a call are equally long (one text, one
image size), so that no prompt is padded.

Positions are 3-D in this model (M-RoPE: time, height, width). They are built once per prompt and
passed explicitly, because transformers otherwise falls back to 1-D positions, or to hidden state
left by the previous call.
"""

import copy
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from qwen_vl_utils import process_vision_info
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from engine.attention import IMPLEMENTATION
from engine.machine import free_host_memory
from engine.model_files import (
    CONFIG,
    ModelError,
    check_exists,
    check_pointers,
    check_quantized,
    check_weights,
    first_line,
    folder_of,
    folder_on_disk,
    kept_files,
    read_json,
)

MODEL_TYPE = "qwen2_5_vl"
HUB_TEXT_CONFIGS = {  # so that a machine too small is told before anything is downloaded
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
LARGEST_ON_CPU = 1_000_000_000  # parameters; a larger model is refused without a GPU
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IMAGE_TYPE = 1  # in mm_token_type_ids
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STOPS = ("<|im_end|>", "<|endoftext|>")  # end a completion of any Qwen chat model
PUBLISHED_PIXELS = {"shortest_edge": 3136, "longest_edge": 12_845_056}  # limits of an image
GIB = 2**30


# --- loading ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """The policy, its frozen copy (None when it is not needed) and what turns text into tokens.

    `adapter` is peft's view of a policy of which only LoRA adapters are trained. `files` are those
    that the model came with beside its weights, and is saved with.
    """

    policy: Qwen2_5_VLForConditionalGeneration
    reference: Qwen2_5_VLForConditionalGeneration | None
    processor: object
    adapter: object | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    @contextmanager
    def as_reference(self) -> Iterator[Qwen2_5_VLForConditionalGeneration]:
        """Yield what the policy is held against: its frozen copy, or itself without its adapter."""
        if self.adapter is None:
            yield self.reference
        else:
            with self.adapter.disable_adapter():
                yield self.policy


def load(
    model: str,
    *,
    device: str,
    dtype: str,
    reference: bool = False,
    freeze_vision: bool = False,
    lora_rank: int = 0,
    seed: int = 0,
) -> Loaded:
    """Return the model of a folder or hub id, in `dtype` on `device`. Raises `ModelError`.

    With a `lora_rank` only adapters of that rank are trained, random numbers from `seed`; the
    reference is the model without them, and takes no copy. The dtype is passed to the loader:
    `model.to(bfloat16)` would round the rotary frequencies as well.
    """
    if lora_rank:
        check_no_adapter(model)
    folder = folder_of(base_of(model))
    processor = load_processor(folder, model_config(model))
    policy = load_weights(model, DTYPES[dtype])
    policy.generation_config = decoding(folder, processor.tokenizer)
    use_own_attention(policy)
    adapter = add_adapter(policy, model, lora_rank, seed) if lora_rank else None
    policy.to(device).eval()
    check_finite(model, policy)
    frozen = None
    if adapter is None:
        frozen = copy.deepcopy(policy).requires_grad_(False) if reference else None
        policy.model.visual.requires_grad_(not freeze_vision)
    return Loaded(policy, frozen, processor, adapter, kept_files(folder))


def add_adapter(policy, model: str, rank: int, seed: int):
    """Freeze the policy, put LoRA adapters beside its language model's linear layers, trainable.

    W becomes W + 2 B A with A (rank, inputs) random and B (outputs, rank) zero (Hu et al. 2021,
    arXiv:2106.09685), so that nothing changes at first. Returns peft's view of the policy.
    """
    from peft import LoraConfig, get_peft_model  # an optional dependency

    policy.name_or_path = os.path.abspath(model) if os.path.isdir(model) else model
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(ADAPTED), exclude_modules=".*visual.*"
    )
    with torch.random.fork_rng(devices=[]), quiet_peft():  # the policy is still on the host
        torch.manual_seed(seed)
        # in the weights' own dtype: AdamW with Kahan summation loses nothing in bf16
        return get_peft_model(policy, config, autocast_adapter_dtype=False)


def check_use(model: str, *, image_size: int, lora_rank: int = 0) -> None:
    """Raise `ModelError` or `ValueError` where flags and model do not go together."""
    shape_config(model)
    if lora_rank:
        check_no_adapter(model)
    check_seen_size(image_processor_of(model), image_size)


def check_files(model: str) -> str:
    """Return what was found in a model's folder, no weight read. Raises `ModelError`."""
    folder = folder_on_disk(base_of(model))
    if folder is None:
        return f"{model}: not on disk; its files are checked once they are fetched"
    config = model_config(model)
    decoding(folder, load_processor(folder, config).tokenizer)
    return f"{folder}: {check_folder(folder, config)}; tokenizer and image processor read"


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Pass over warnings: of an old name by which peft calls transformers, of what we tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # see `check_names`
        yield


def trainable(model) -> list[torch.nn.Parameter]:
    """Return the parameters that are trained: all, all but the vision tower's, or adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def load_weights(
    model: str, dtype: torch.dtype, config: Qwen2_5_VLConfig | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """Return the model of a folder or hub id on the host; safetensors only, no code of others.

    With its own config, unless one is given. A folder with an adapter gives the model that it
    belongs to, with the adapter merged into its weights. Raises `ModelError`.
    """
    if (base := base_of(model)) != model:
        return merge(load_weights(base, dtype), model)
    folder = folder_of(model)
    config = config or model_config(model)
    check_folder(folder, config)
    try:
        with progress_bar(sys.stderr.isatty()):
            return Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
    except Exception as error:  # whatever a damaged folder makes it raise
        raise ModelError(f"model {model}: cannot be loaded: {first_line(error)}") from error


def check_folder(folder: Path, config: Qwen2_5_VLConfig) -> str:
    """Return what the files of a model were found to be, no weight read. Raises `ModelError`."""
    check_pointers(folder)
    empty = empty_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]  # the embeddings, under another name
    return check_weights(folder, shapes)


def base_of(model: str) -> str:
    """Return the folder or hub id that an adapter's folder belongs to; of any other, itself.

    Raises `ModelError`.
    """
    path = Path(model) / "adapter_config.json"
    if not path.is_file():
        return model
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{path}: does not name the model that the adapter belongs to")
    try:
        check_exists(base)
    except ModelError as error:
        raise ModelError(
            f"{path}: the adapter belongs to {base}, and there is no such folder; if that model "
            f"has moved, write its place to base_model_name_or_path in this file"
        ) from error
    return base


def check_no_adapter(model: str) -> None:
    """Raise `ModelError` for a model that is an adapter: another on top would fit nothing else."""
    if base_of(model) != model:
        raise ModelError(
            f"--model {model}: is an adapter, and one that is trained on top of it would be of no "
            f"use without it. Go on with its run (--resume RUN --steps N), or make a whole model "
            f"of it first (--resume RUN --merge)"
        )


def merge(base, adapter: str):
    """Return a model with the adapter of a folder added to its weights. Raises `ModelError`."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ModelError(f"model {adapter}: an adapter needs peft: pip install peft") from error
    try:
        check_pointers(Path(adapter))
        with quiet_peft():
            on_host = PeftModel.from_pretrained(base, adapter, torch_device="cpu")
            wanted = get_peft_model_state_dict(on_host, save_embedding_layers=False).keys()
            check_names(adapter, wanted)
            return on_host.merge_and_unload()
    except ModelError:
        raise
    except Exception as error:  # whatever a damaged folder makes it raise
        raise ModelError(f"model {adapter}: cannot be loaded: {first_line(error)}") from error


def check_names(adapter: str, wanted: Iterable[str]) -> None:
    """Raise `ModelError` unless an adapter's file holds what its base takes, under these names.

    peft would pass over names that fit nowhere, and give the base without an adapter.
    """
    with safe_open(Path(adapter) / "adapter_model.safetensors", "pt") as file:
        found = set(file.keys())
    if surplus := sorted(found.difference(wanted)):
        raise ModelError(
            f"model {adapter}: {len(surplus)} of its {len(found)} weights fit nowhere in its base "
            f"model, as {surplus[0]}"
        )
    if missing := sorted(set(wanted) - found):
        raise ModelError(f"model {adapter}: {len(missing)} weights are missing, as {missing[0]}")


def load_processor(folder: Path, config: Qwen2_5_VLConfig):
    """Return what turns text and images into model inputs. Raises `ModelError`.

    Also where files are damaged in a way that transformers passes over: it would go on with an
    empty vocabulary.
    """
    text = "<answer>12.34</answer>"
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        tokenizer = processor.tokenizer
        if tokenizer.decode(tokenizer(text)["input_ids"]) != text or tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer is incomplete")
        prompts = encode(processor, [Image.new("RGB", (56, 56))], system="", prompt=text)
        is_image = prompts.input_ids == config.image_token_id
        if not is_image.any() or not torch.equal(is_image, prompts.mm_token_type_ids == IMAGE_TYPE):
            raise ValueError("tokenizer, chat template and config.json disagree on the image token")
    except Exception as error:  # whatever a damaged folder makes it raise
        raise ModelError(f"model {folder}: cannot be loaded: {first_line(error)}") from error
    return processor


def decoding(folder: Path, tokenizer) -> GenerationConfig:
    """Return how a model is to be decoded, by others too: as it was trained and measured.

    With its own stop ids and padding, and nothing that reshapes its distribution: the published
    generation_config.json has a repetition penalty and a temperature of 1e-6. Raises `ModelError`.
    """
    path = folder / "generation_config.json"
    published = read_json(path) if path.exists() else {}
    stops = published.get("eos_token_id")
    pad = published.get("pad_token_id", tokenizer.pad_token_id)
    if stops is None:
        stops = known_ids(tokenizer, STOPS)
        print(f"{path}: names no eos_token_id; completions end at {' or '.join(STOPS)}")
    stops = [stops] if isinstance(stops, int) else stops
    if not (isinstance(stops, list) and stops and all(isinstance(stop, int) for stop in stops)):
        raise ModelError(f"{path}: no eos_token_id, which ends a completion")
    return GenerationConfig(
        eos_token_id=stops,
        pad_token_id=pad,
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        repetition_penalty=1.0,
    )


def known_ids(tokenizer, tokens: tuple[str, ...]) -> list[int]:
    """Return the ids of those tokens that the tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens if token in vocabulary]


def check_finite(model: str, policy) -> None:
    """Raise `ModelError` for a model with a weight that is not a number, or infinite."""
    if names := not_finite(policy):
        raise ModelError(
            f"model {model}: {len(names)} of its weights are not finite (nan or infinite), as "
            f"{names[0]}: its files are damaged, or its training went wrong"
        )


def not_finite(policy) -> list[str]:
    """Return the names of the parameters that hold a value that is not finite."""
    names, parameters = zip(*policy.named_parameters(), strict=True)
    finite = torch.stack([parameter.isfinite().all() for parameter in parameters])
    if finite.all():  # host sync
        return []
    return [name for name, is_finite in zip(names, finite.tolist(), strict=True) if not is_finite]


@torch.no_grad()
def copy_weights(folder: Path, model) -> None:
    """Give a model, in place, the weights that `save_pretrained` wrote. Raises `ModelError`.

    In place, because recorded steps and optimizers know a weight by where it lies.
    """
    saved = load_weights(str(folder), model.dtype, copy.deepcopy(model.config))
    for new, old in zip(saved.parameters(), model.parameters(), strict=True):
        old.copy_(new)


@torch.no_grad()
def copy_policy(folder: Path, loaded: Loaded) -> None:
    """Give the policy, in place, what `save_policy` wrote. Raises `ModelError`."""
    if loaded.adapter is None:
        return copy_weights(folder, loaded.policy)
    from peft import get_peft_model_state_dict

    try:
        saved = load_file(folder / "adapter_model.safetensors")
        adapter = get_peft_model_state_dict(loaded.adapter, save_embedding_layers=False)
        for name, tensor in adapter.items():  # named as in the file, the parameters' own memory
            tensor.copy_(saved[name])
    except Exception as error:  # whatever a damaged file makes it raise
        raise ModelError(f"{folder}: cannot be loaded: {first_line(error)}") from error


def save_policy(loaded: Loaded, folder: Path) -> None:
    """Write policy and processor to a folder: of a policy with an adapter, the adapter."""
    if loaded.adapter is None:
        save_weights(loaded.policy, folder)
    else:
        loaded.adapter.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink()  # a form to fill in
        loaded.policy.generation_config.save_pretrained(folder)
    save_files(loaded, folder)


def save_merged(loaded: Loaded, folder: Path) -> None:
    """Write the policy with its adapter merged into the weights; the adapter to `adapter/`."""
    save_policy(loaded, folder / "adapter")
    merged = load_weights(str(folder / "adapter"), loaded.policy.dtype)
    merged.generation_config = loaded.policy.generation_config
    save_weights(merged, folder)
    save_files(loaded, folder)


def save_files(loaded: Loaded, folder: Path) -> None:
    """Write what goes beside the weights: the base's own files where it has them, unchanged.

    transformers would write tokenizer, preprocessor and config in the form of its own version,
    which older ones cannot read. An adapter's folder has no config.json.
    """
    if not loaded.files:
        loaded.processor.save_pretrained(folder)
    for name, content in loaded.files.items():
        if name != CONFIG:
            (folder / name).write_bytes(content)
        elif (folder / CONFIG).exists():
            (folder / CONFIG).write_bytes(with_dtype(content, loaded.policy.dtype))


def with_dtype(config: bytes, dtype: torch.dtype) -> bytes:
    """Return a config.json for weights of this dtype: unchanged if they are what it says.

    >>> with_dtype(b'{"torch_dtype": "bfloat16"}', torch.bfloat16)
    b'{"torch_dtype": "bfloat16"}'
    """
    values, name = json.loads(config), str(dtype).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    if values.get(key) == name:
        return config
    return json.dumps(values | {key: name}, indent=2).encode() + b"\n"


def save_weights(model, folder: Path) -> None:
    """Write a model to a folder, for `from_pretrained`, without a progress bar."""
    with progress_bar(False):
        model.save_pretrained(folder)


@contextmanager
def progress_bar(is_shown: bool) -> Iterator[None]:
    """Let transformers show its progress bars in the block, if it would at all, or not."""
    before = is_progress_bar_enabled()
    if not is_shown:
        disable_progress_bar()
    try:
        yield
    finally:
        if before:
            enable_progress_bar()


def use_own_attention(model) -> None:
    """Let the model's layers call `attention.attention`, and embed patches by a matrix product.

    Raises `ModelError` for layers that attend to a sliding window, which it does not know.
    """
    if set(model.config.text_config.layer_types) != {"full_attention"}:
        raise ModelError("a model whose attention slides over a window cannot be used")
    model.set_attn_implementation(IMPLEMENTATION)
    visual = model.model.visual
    for number, block in enumerate(visual.blocks):
        block.attn.sees_whole_image = number in visual.config.fullatt_block_indexes
    visual.patch_embed.proj.__class__ = PatchProjection


class PatchProjection(torch.nn.Conv3d):
    """The convolution that embeds patches: they do not overlap, so it is a matrix product."""

    def forward(self, patches: Tensor) -> Tensor:
        """Return (patches, hidden) of (patches, channels, time, height, width)."""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def model_config(model: str) -> Qwen2_5_VLConfig:
    """Return the config of a folder or hub id. Raises `ModelError` if it is not Qwen2.5-VL."""
    model = base_of(model)
    folder = folder_of(model, config_only=True)
    check_pointers(folder)
    if not (folder / CONFIG).exists():
        raise ModelError(f"model {model}: no readable model in this folder: no {CONFIG}")
    described = read_json(folder / CONFIG)
    if described.get("model_type") != MODEL_TYPE:
        kind = described.get("model_type", "nameless")
        raise ModelError(f"model {model}: is a {kind} model, not {MODEL_TYPE}")
    check_quantized(model, described)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"model {model}: config.json cannot be read: {first_line(error)}"
        ) from error


def shape_config(model: str) -> Qwen2_5_VLConfig:
    """Return a config with the model's shape, of the well-known ones without a download.

    Raises `ModelError`.
    """
    model = base_of(model)
    if model not in HUB_TEXT_CONFIGS:
        return model_config(model)
    text = HUB_TEXT_CONFIGS[model]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLConfig(
        text_config={**text, "rms_norm_eps": 1e-6, "rope_parameters": rope},
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": text["hidden_size"],
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def parameter_count(config: Qwen2_5_VLConfig) -> int:
    """Return the number of parameters without making one."""
    return numel(empty_model(config))


def trained_count(
    config: Qwen2_5_VLConfig, *, lora_rank: int = 0, freeze_vision: bool = False
) -> int:
    """Return how many parameters `load` leaves to be trained, its adapters included."""
    empty = empty_model(config)
    if lora_rank:
        modules = empty.model.language_model.named_modules()
        layers = [module for name, module in modules if name.split(".")[-1] in ADAPTED]
        return sum(lora_rank * (layer.in_features + layer.out_features) for layer in layers)
    return numel(empty) - (numel(empty.model.visual) if freeze_vision else 0)


def empty_model(config: Qwen2_5_VLConfig) -> Qwen2_5_VLForConditionalGeneration:
    """Return a model whose tensors have shapes and no values."""
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


def numel(module: torch.nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def place(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trained: int = 0,
    reference: bool = False,
    processes: int = 1,
    command_that_runs: str,
) -> tuple[str, str]:
    """Return the device and dtype to load the model with, in place of "auto".

    Raises `ModelError` where this machine cannot hold it, with so many of its parameters `trained`
    and the optimizer shared out to `processes`; nothing is downloaded to find that out.
    """
    count = parameter_count(shape_config(model))
    found_gpu = torch.cuda.is_available()
    runs_here = f"What runs on this machine: {command_that_runs}"
    wanted = device
    device, dtype = choose_device(count, device=device, dtype=dtype)
    kept = DTYPES[dtype]
    copies = 1 + optimizer_copies(kept) / processes  # gradient; moments, for bf16 Kahan's as well
    needed = kept.itemsize * (count * (1 + reference) + trained * copies)
    purpose = "to train, activations not counted" if trained else "to run"
    size = f"{count / 1e9:.2f} billion" if count > 1e8 else f"{count / 1e6:.1f} million"
    asks = f"{model} ({size} parameters) needs {needed / GIB:.1f} GiB {purpose}"
    if device == "cuda" and not found_gpu:
        flag = "" if wanted == "auto" else "--device cuda: "
        raise ModelError(f"{flag}{asks}, on a CUDA GPU; found: no CUDA GPU. {runs_here}")
    free, _ = free_memory(torch.device(device))
    if needed > free:
        raise ModelError(f"{asks}; found: {free / GIB:.1f} GiB free on {device}. {runs_here}")
    return device, dtype


def choose_device(count: int, *, device: str, dtype: str) -> tuple[str, str]:
    """Return device and dtype for so many parameters, "auto" settled; the GPU may be missing."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() or count > LARGEST_ON_CPU else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return device, dtype


def optimizer_copies(dtype: torch.dtype) -> int:
    """Return how many tensors AdamW keeps of each weight: two moments, for bf16 Kahan's as well."""
    return 3 if dtype == torch.bfloat16 else 2


def free_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes that can still be used there, and all there are."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused, total  # what torch holds in reserve can be used again
    return free_host_memory()


def stop_ids(model) -> list[int]:
    """Return all token ids that end a completion: Qwen's chat models have two."""
    ids = model.generation_config.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids)


# --- prompts ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """Model inputs of Q prompts with one image each; `prompts[a:b]` are some of them.

    Types and grid describe the layout and stay on the host, where all indices are made of them: the
    host never waits for the device to learn where an image stands.
    """

    input_ids: Tensor  # (Q, P)
    pixel_values: Tensor  # (Q, patches, values per patch)
    mm_token_type_ids: Tensor  # (Q, P), 1 where an image token stands
    image_grid_thw: Tensor  # (Q, 3): patches in time, height, width
    visual: Tensor | None = None  # (Q, visual tokens, hidden): what a model's `see` made of them

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice) -> "Prompts":
        return Prompts(
            self.input_ids[rows],
            self.pixel_values[rows],
            self.mm_token_type_ids[rows],
            self.image_grid_thw[rows],
            None if self.visual is None else self.visual[rows],
        )

    def unseen(self) -> "Prompts":
        """Return the prompts without what was seen: other weights must look for themselves."""
        return replace(self, visual=None)

    def to(self, device: str) -> "Prompts":
        """Return the prompts with what the model computes on moved there."""
        return replace(
            self,
            input_ids=send(self.input_ids, device),
            pixel_values=send(self.pixel_values, device),
        )

    def pin_memory(self) -> "Prompts":
        """Return the prompts in memory a GPU can fetch by itself; the DataLoader calls this."""
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            pixel_values=self.pixel_values.pin_memory(),
        )


def encode(processor, images: list[Image.Image], *, system: str, prompt: str) -> Prompts:
    """Return model inputs on the host: all images of one size, all with the same question.

    Raises `ValueError` for images of several sizes.
    """
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(f"all images of a call must have one size, not {sorted(sizes)}")
    input_ids, mm_token_type_ids = encode_text(processor, system, prompt, sizes.pop())
    chats = [[user_turn(image, prompt)] for image in images]
    pictures, _ = process_vision_info(chats)
    batch = processor.image_processor(images=pictures, return_tensors="pt")
    return Prompts(
        input_ids=input_ids.repeat(len(images), 1),  # `expand` shares memory: it cannot be pinned
        pixel_values=batch["pixel_values"].unflatten(0, (len(images), -1)),
        mm_token_type_ids=mm_token_type_ids.repeat(len(images), 1),
        image_grid_thw=batch["image_grid_thw"],
    )


def image_processor_of(model: str) -> Qwen2VLImageProcessor:
    """Return what cuts a model's images into patches. Raises `ModelError`.

    Of a model that is not on disk yet, one with the limits of those that are published.
    """
    folder = folder_on_disk(base_of(model))
    if folder is None:
        return Qwen2VLImageProcessor(size=PUBLISHED_PIXELS)
    try:
        return AutoImageProcessor.from_pretrained(folder)
    except Exception as error:  # whatever a damaged folder makes it raise
        raise ModelError(f"model {model}: cannot be loaded: {first_line(error)}") from error


def check_seen_size(processor: Qwen2VLImageProcessor, image_size: int) -> None:
    """Raise `ValueError` for an image size, in pixels, that the image processor would change.

    What the model saw, and how many tokens it took, would not be what the flag says.
    """
    image = Image.new("RGB", (image_size, image_size))
    pictures, _ = process_vision_info([[user_turn(image, "")]])
    _, height, width = processor(images=pictures, return_tensors="pt")["image_grid_thw"][0].tolist()
    seen = (width * processor.patch_size, height * processor.patch_size)
    if seen != image.size:
        least, most = (processor.size[edge] for edge in PUBLISHED_PIXELS)
        raise ValueError(
            f"--image-size {image_size}: the model's image processor would make it {seen[0]} x "
            f"{seen[1]}; it takes {least:,} to {most:,} pixels in all"
        )


@lru_cache(maxsize=8)
def encode_text(
    processor, system: str, prompt: str, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return token ids and token types of a prompt about an image of that size, (1, P) each.

    They depend on nothing else, so they are made once.
    """
    image = Image.new("RGB", image_size)
    chat = [{"role": "system", "content": system}, user_turn(image, prompt)]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    pictures, _ = process_vision_info(chat)
    batch = processor(text=[text], images=pictures, return_tensors="pt")
    return batch["input_ids"], batch["mm_token_type_ids"]


def user_turn(image: Image.Image, prompt: str) -> dict:
    """Return the user's message: an image, then the question."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    return {"role": "user", "content": content}


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on the device. The host does not wait for what is queued there."""
    return tensor.to(device, non_blocking=True)


def embed_prompts(model, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings (Q, P, hidden), positions (3, Q, P), first completion positions (Q, 1).

    The vision tower reads each image once, or not if it has been seen. Completion token t stands at
    `first + t` on all three axes: the image's 2-D block takes fewer positions than it has tokens,
    so `first` is below P.
    """
    core, types, grid = model.model, prompts.mm_token_type_ids, prompts.image_grid_thw
    embeds = core.get_input_embeddings()(prompts.input_ids)
    visual = see(model, prompts).visual.flatten(0, 1).to(embeds.dtype)
    places = (types == IMAGE_TYPE).flatten().nonzero()[:, 0]
    places = send(places, embeds.device)
    embeds = embeds.flatten(0, 1).index_copy(0, places, visual).view_as(embeds)
    # of the ids only the shape matters here: an image stands where the types say so
    positions, delta = core.get_rope_index(torch.zeros_like(types), types, image_grid_thw=grid)
    first = types.shape[1] + delta
    return embeds, send(positions, embeds.device), send(first, embeds.device)


def see(model, prompts: Prompts) -> Prompts:
    """Return the prompts with what the vision tower makes of their images, if not seen already.

    Differentiable where gradients are enabled and the tower is trained.
    """
    if prompts.visual is not None:
        return prompts
    core, grid = model.model, prompts.image_grid_thw
    images = core.get_image_features(
        prompts.pixel_values.flatten(0, 1), grid, **vision_layout(core.visual, grid)
    )
    return replace(prompts, visual=torch.stack(list(images.pooler_output)))


def vision_layout(visual, grid: Tensor) -> dict[str, object]:
    """Return positions and attention windows of the patches of some images, grid (images, 3).

    transformers would make the same on the device, read it back in every block, and attend to one
    window after the other. Windows of one size, as of 224 pixels, are attended to at once.
    """
    config = visual.config
    window_index, borders = get_vision_window_index(
        grid, config.spatial_merge_size, config.window_size, config.patch_size
    )
    positions = get_vision_position_ids(grid, config.spatial_merge_size)
    layout = {
        "position_ids": send(positions, visual.device),
        "window_index": send(window_index, visual.device),
        "cu_window_seqlens": borders,  # borders are read by the host, and so stay there
        "cu_seqlens": get_vision_cu_seqlens(grid),
    }
    if config._attn_implementation == IMPLEMENTATION and len(borders.diff().unique()) == 1:
        layout["windows"] = (len(layout["cu_seqlens"]) - 1, len(borders) - 1)
        everything = borders[[0, -1]]  # no border: `attention` cuts into `windows`
        layout |= {"cu_window_seqlens": everything, "cu_seqlens": everything}
    return layout
