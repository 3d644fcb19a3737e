"""Load and save a Qwen2.5-VL checkpoint, its frozen copy and LoRA adapters."""

import copy
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from engine.attention import IMPLEMENTATION
from engine.model_files import (
    CONFIG,
    ModelError,
    base_of,
    check_pointers,
    check_weights,
    first_line,
    folder_of,
    folder_on_disk,
    kept_files,
    read_json,
)
from engine.prompts import IMAGE_TYPE, check_no_resize, encode_prompts, image_processor_of
from engine.sizes import ADAPTED, DTYPES, empty_model, model_config, shape_config

STOPS = ("<|im_end|>", "<|endoftext|>")  # stop tokens of all Qwen chat models


# --- loading ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """The policy, its frozen copy (None if not needed) and the processor of text and images.

    `adapter` is peft's wrapper of the policy if only LoRA adapters are trained. `files` are the
    model's other files, by name, which `save_files` writes beside new weights.
    """

    policy: Qwen2_5_VLForConditionalGeneration
    reference: Qwen2_5_VLForConditionalGeneration | None
    processor: object
    adapter: object | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    @contextmanager
    def as_reference(self) -> Iterator[Qwen2_5_VLForConditionalGeneration]:
        """Yield the reference: the frozen copy, or the policy with its adapter disabled."""
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

    With a `lora_rank`, only adapters of that rank are trained, initialized from `seed`; the
    reference is the model without them and needs no copy. The loader casts the weights, because
    `model.to(bfloat16)` would round the rotary frequencies as well.
    """
    if lora_rank:
        check_no_adapter(model)
    folder = folder_of(base_of(model))
    processor = load_processor(folder, model_config(model))
    policy = load_weights(model, DTYPES[dtype])
    policy.generation_config = generation_config_of(folder, processor.tokenizer)
    use_own_attention(policy)
    adapter = add_adapter(policy, model, lora_rank, seed) if lora_rank else None
    policy.to(device).eval()
    check_finite(model, policy)
    frozen = None
    if adapter is None:
        frozen = copy.deepcopy(policy).requires_grad_(False) if reference else None
        policy.model.visual.requires_grad_(not freeze_vision)
    return Loaded(policy, frozen, processor, adapter, kept_files(folder))


def load_weights(
    model: str, dtype: torch.dtype, config: Qwen2_5_VLConfig | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """Return the model of a folder or hub id, in host memory. Raises `ModelError`.

    Reads safetensors only and runs no code from the folder. `config` replaces the model's own. For
    an adapter's folder, returns its base model with the adapter merged into the weights.
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
    except Exception as error:  # a damaged folder can raise anything
        raise ModelError(f"model {model}: cannot be loaded: {first_line(error)}") from error


def load_processor(folder: Path, config: Qwen2_5_VLConfig):
    """Return the processor of text and images. Raises `ModelError`.

    Also raises it for damage that transformers ignores, such as an empty vocabulary.
    """
    text = "<answer>12.34</answer>"
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        tokenizer = processor.tokenizer
        if tokenizer.decode(tokenizer(text)["input_ids"]) != text or tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer is incomplete")
        prompts = encode_prompts(processor, [Image.new("RGB", (56, 56))], system="", prompt=text)
        is_image = prompts.input_ids == config.image_token_id
        if not is_image.any() or not torch.equal(is_image, prompts.mm_token_type_ids == IMAGE_TYPE):
            raise ValueError("tokenizer, chat template and config.json disagree on the image token")
    except Exception as error:  # a damaged folder can raise anything
        raise ModelError(f"model {folder}: cannot be loaded: {first_line(error)}") from error
    return processor


def use_own_attention(model) -> None:
    """Make the model's layers call `attention.attention`, and embed patches with a matmul.

    Raises `ModelError` for layers with sliding-window attention, which it does not support.
    """
    if set(model.config.text_config.layer_types) != {"full_attention"}:
        raise ModelError("models with sliding-window attention are not supported")
    model.set_attn_implementation(IMPLEMENTATION)
    visual = model.model.visual
    for number, block in enumerate(visual.blocks):
        block.attn.sees_whole_image = number in visual.config.fullatt_block_indexes
    visual.patch_embed.proj.__class__ = PatchProjection


class PatchProjection(torch.nn.Conv3d):
    """The convolution that embeds patches, as a matmul: patches do not overlap."""

    def forward(self, patches: Tensor) -> Tensor:
        """Return embeddings (patches, hidden) of (patches, channels, time, height, width)."""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def generation_config_of(folder: Path, tokenizer) -> GenerationConfig:
    """Return the generation config to save, so that others decode as in training and evaluation.

    Keeps the model's stop ids and padding, and nothing that changes the distribution: the published
    generation_config.json has a repetition penalty and a temperature of 1e-6. Raises `ModelError`.
    """
    path = folder / "generation_config.json"
    published = read_json(path) if path.exists() else {}
    stops = published.get("eos_token_id")
    pad = published.get("pad_token_id", tokenizer.pad_token_id)
    if stops is None:
        stops = known_ids(tokenizer, STOPS)
        print(f"{path}: has no eos_token_id; completions stop at {' or '.join(STOPS)}")
    stops = [stops] if isinstance(stops, int) else stops
    if not (isinstance(stops, list) and stops and all(isinstance(stop, int) for stop in stops)):
        raise ModelError(f"{path}: no valid eos_token_id, so completions would never stop")
    return GenerationConfig(
        eos_token_id=stops,
        pad_token_id=pad,
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        repetition_penalty=1.0,
    )


def known_ids(tokenizer, tokens: tuple[str, ...]) -> list[int]:
    """Return the ids of the tokens that are in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens if token in vocabulary]


def check_finite(model: str, policy) -> None:
    """Raise `ModelError` if any weight is nan or infinite."""
    if names := non_finite_parameters(policy):
        raise ModelError(
            f"model {model}: {len(names)} of its weights are not finite (nan or infinite), e.g. "
            f"{names[0]}: the files are damaged, or training failed"
        )


def non_finite_parameters(policy) -> list[str]:
    """Return the names of the parameters with nan or infinite values."""
    names, parameters = zip(*policy.named_parameters(), strict=True)
    finite = torch.stack([parameter.isfinite().all() for parameter in parameters])
    if finite.all():  # host sync
        return []
    return [name for name, is_finite in zip(names, finite.tolist(), strict=True) if not is_finite]


def check_compatible(model: str, *, image_size: int, lora_rank: int = 0) -> None:
    """Raise `ModelError` or `ValueError` if the flags do not fit the model."""
    shape_config(model)
    if lora_rank:
        check_no_adapter(model)
    check_no_resize(image_processor_of(model), image_size)


def check_files(model: str) -> str:
    """Return a report on a model's files, without reading weights. Raises `ModelError`."""
    folder = folder_on_disk(base_of(model))
    if folder is None:
        return f"{model}: not on disk; its files are checked after the download"
    config = model_config(model)
    generation_config_of(folder, load_processor(folder, config).tokenizer)
    return f"{folder}: {check_folder(folder, config)}; tokenizer and image processor load"


def check_folder(folder: Path, config: Qwen2_5_VLConfig) -> str:
    """Return a report on a folder's weight files, without reading weights. Raises `ModelError`."""
    check_pointers(folder)
    empty = empty_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]  # tied to the embeddings
    return check_weights(folder, shapes)


@contextmanager
def progress_bar(is_shown: bool) -> Iterator[None]:
    """Hide transformers' progress bars in the block unless `is_shown`."""
    before = is_progress_bar_enabled()
    if not is_shown:
        disable_progress_bar()
    try:
        yield
    finally:
        if before:
            enable_progress_bar()


# --- adapters ---------------------------------------------------------------------------


def add_adapter(policy, model: str, rank: int, seed: int):
    """Freeze the policy, add LoRA adapters to its language model, return peft's wrapper of it.

    Every linear layer's W becomes W + 2 B A, with A (rank, inputs) random and B (outputs, rank)
    zero (Hu et al. 2021, arXiv:2106.09685), so the initial output is unchanged.
    """
    from peft import LoraConfig, get_peft_model  # an optional dependency

    policy.name_or_path = os.path.abspath(model) if os.path.isdir(model) else model
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(ADAPTED), exclude_modules=".*visual.*"
    )
    with torch.random.fork_rng(devices=[]), quiet_peft():  # the policy is still on the host
        torch.manual_seed(seed)
        # keep the weights' dtype: AdamW with Kahan summation loses no precision in bf16
        return get_peft_model(policy, config, autocast_adapter_dtype=False)


def trainable(model) -> list[torch.nn.Parameter]:
    """Return the trained parameters: all, all but the vision tower's, or the adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def check_no_adapter(model: str) -> None:
    """Raise `ModelError` if the model is an adapter: a second adapter would need the first."""
    if base_of(model) != model:
        raise ModelError(
            f"--model {model}: is an adapter, and another adapter trained on top of it would be "
            f"useless without it. Resume its run (--resume RUN --steps N), or merge it into a full "
            f"model first (--resume RUN --merge)"
        )


def merge(base, adapter: str):
    """Return the base model with a folder's adapter merged into it. Raises `ModelError`."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ModelError(f"model {adapter}: adapters need peft: pip install peft") from error
    try:
        check_pointers(Path(adapter))
        with quiet_peft():
            on_host = PeftModel.from_pretrained(base, adapter, torch_device="cpu")
            wanted = get_peft_model_state_dict(on_host, save_embedding_layers=False).keys()
            check_names(adapter, wanted)
            return on_host.merge_and_unload()
    except ModelError:
        raise
    except Exception as error:  # a damaged folder can raise anything
        raise ModelError(f"model {adapter}: cannot be loaded: {first_line(error)}") from error


def check_names(adapter: str, wanted: Iterable[str]) -> None:
    """Raise `ModelError` unless the names in an adapter's file are those its base model expects.

    peft ignores names that match nothing, and would return the base model without an adapter.
    """
    with safe_open(Path(adapter) / "adapter_model.safetensors", "pt") as file:
        found = set(file.keys())
    if surplus := sorted(found.difference(wanted)):
        raise ModelError(
            f"model {adapter}: {len(surplus)} of its {len(found)} weights match nothing in its "
            f"base model, e.g. {surplus[0]}"
        )
    if missing := sorted(set(wanted) - found):
        raise ModelError(f"model {adapter}: {len(missing)} weights are missing, e.g. {missing[0]}")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide peft's warnings about a deprecated transformers name and about missing keys."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # see `check_names`
        yield


# --- saving -----------------------------------------------------------------------------


def save_policy(loaded: Loaded, folder: Path) -> None:
    """Write policy and processor to a folder; of an adapted policy, only the adapter."""
    if loaded.adapter is None:
        save_weights(loaded.policy, folder)
    else:
        loaded.adapter.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink()  # peft's empty model card
        loaded.policy.generation_config.save_pretrained(folder)
        let_others_read(folder)
    save_files(loaded, folder)


def save_merged(loaded: Loaded, folder: Path) -> None:
    """Write the policy with its adapter merged into it, and the adapter itself to `adapter/`."""
    save_policy(loaded, folder / "adapter")
    merged = load_weights(str(folder / "adapter"), loaded.policy.dtype)
    merged.generation_config = loaded.policy.generation_config
    save_weights(merged, folder)
    save_files(loaded, folder)


def save_files(loaded: Loaded, folder: Path) -> None:
    """Write the files beside the weights: the base model's own where it has them.

    They stay unchanged, but for the dtype in config.json: transformers would write tokenizer,
    preprocessor and config in its own version's format, which older versions cannot read. An
    adapter's folder has no config.json.
    """
    if not loaded.files:
        loaded.processor.save_pretrained(folder)
    for name, content in loaded.files.items():
        if name != CONFIG:
            (folder / name).write_bytes(content)
        elif (folder / CONFIG).exists():
            (folder / CONFIG).write_bytes(with_dtype(content, loaded.policy.dtype))


def with_dtype(config: bytes, dtype: torch.dtype) -> bytes:
    """Return a config.json for weights of this dtype, unchanged if it already says so.

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
    let_others_read(folder)


def let_others_read(folder: Path) -> None:
    """Give weights the mode of the files beside them: safetensors keeps them for their owner."""
    mode = (folder / "generation_config.json").stat().st_mode
    for weights in folder.glob("*.safetensors"):
        weights.chmod(mode)


@torch.no_grad()
def copy_policy(folder: Path, loaded: Loaded) -> None:
    """Copy the weights that `save_policy` wrote into the policy. Raises `ModelError`."""
    if loaded.adapter is None:
        return copy_weights(folder, loaded.policy)
    from peft import get_peft_model_state_dict

    try:
        saved = load_file(folder / "adapter_model.safetensors")
        adapter = get_peft_model_state_dict(loaded.adapter, save_embedding_layers=False)
        for name, tensor in adapter.items():  # the parameters' own memory, by names in the file
            tensor.copy_(saved[name])
    except Exception as error:  # a damaged file can raise anything
        raise ModelError(f"{folder}: cannot be loaded: {first_line(error)}") from error


@torch.no_grad()
def copy_weights(folder: Path, model) -> None:
    """Copy the weights that `save_pretrained` wrote into a model. Raises `ModelError`.

    In place, because captured CUDA graphs and optimizers keep referring to these tensors.
    """
    saved = load_weights(str(folder), model.dtype, copy.deepcopy(model.config))
    for new, old in zip(saved.parameters(), model.parameters(), strict=True):
        old.copy_(new)
