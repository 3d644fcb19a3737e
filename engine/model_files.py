"""Find a model's files on disk or download them, and check them without loading a weight.

A hub id that is completely in the cache needs no network. Everything after `folder_of` works on a
folder, so local and downloaded models are loaded, checked and copied the same way.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
PREPROCESSORS = ("processor_config.json", "preprocessor_config.json")
TOKENIZERS = ("tokenizer.json", "vocab.json")
KEPT_FILES = (  # saved beside new weights, so that a tool that reads the base model reads them too
    *(CONFIG, *PREPROCESSORS, "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja", *TOKENIZERS, "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # downloaded from a hub repository
LFS_POINTER = b"version https://git-lfs"
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes in a safetensors header
UNQUANTIZED = {2048: "3B", 3584: "7B", 5120: "32B", 8192: "72B"}  # published models by hidden size
QUANTIZATIONS = ("quantization_config", "compression_config")  # keys in config.json
LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit


class ModelError(Exception):
    """A model cannot be used here. The message is one line for the user."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, plus the second if the first ends in a colon.

    >>> first_line(RuntimeError("Error(s) in loading:\\n\\tsize mismatch for a.weight\\n\\t..."))
    'Error(s) in loading: size mismatch for a.weight'
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


# --- finding a model --------------------------------------------------------------------


def folder_of(model: str, *, config_only: bool = False) -> Path:
    """Return the folder of a model, downloading the model if needed. Raises `ModelError`.

    `model` is a folder or a hub id; `config_only` asks for its config.json only. Prints a line
    before a download.
    """
    check_exists(model)
    if folder := folder_on_disk(model, config_only=config_only):
        return folder
    print(f"{model}: not on disk; downloading it from the hub", flush=True)
    try:
        fetched = snapshot_download(model, allow_patterns=[CONFIG] if config_only else WANTED)
    except Exception as error:  # a lost connection or a missing repository raises many types
        raise ModelError(
            f"model {model}: not in the hub cache (HF_HOME sets its location), and the download "
            f"failed: {first_line(error)}"
        ) from error
    if not (config_only or is_whole(Path(fetched))):
        raise ModelError(f"model {model}: only part of it is on disk, and the hub is unreachable")
    return Path(fetched)


def folder_on_disk(model: str, *, config_only: bool = False) -> Path | None:
    """Return a model's folder on disk: local, or complete in the hub's cache; else None.

    With `config_only`, config.json in the cache is enough.
    """
    if os.path.isdir(model):
        return Path(model)
    try:
        cached = Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None
    return cached if (cached / CONFIG).is_file() and (config_only or is_whole(cached)) else None


def check_exists(model: str) -> None:
    """Raise `ModelError` if the name is not a folder and cannot be a hub id."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model)
    if not os.path.isdir(model) and (not is_hub_id or os.path.isdir(model.split("/")[0])):
        raise ModelError(f"model {model}: no such folder, and not a hub id like Qwen/NAME")


def base_of(model: str) -> str:
    """Return the base model (folder or hub id) of an adapter's folder; any other model as it is.

    Raises `ModelError`.
    """
    path = Path(model) / "adapter_config.json"
    if not path.is_file():
        return model
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{path}: does not name the adapter's base model")
    try:
        check_exists(base)
    except ModelError as error:
        raise ModelError(
            f"{path}: the adapter's base model is {base}, and there is no such folder; if the "
            f"model has moved, set base_model_name_or_path in this file to its new path"
        ) from error
    return base


def is_whole(folder: Path) -> bool:
    """Return whether a folder has config, tokenizer, preprocessor and all weight files."""

    def has_one(names: tuple[str, ...]) -> bool:
        return any((folder / name).is_file() for name in names)

    if not (has_one((CONFIG,)) and has_one(PREPROCESSORS) and has_one(TOKENIZERS)):
        return False
    try:
        return all(path.is_file() for path in weight_files(folder))
    except ModelError:
        return False


# --- checking a folder ------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """Return the JSON object in a file. Raises `ModelError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: is not a JSON object")
    return value


def kept_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of the KEPT_FILES in a folder, by name."""
    paths = (folder / name for name in KEPT_FILES)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def check_pointers(folder: Path) -> None:
    """Raise `ModelError` if a file is a git-lfs pointer instead of its content."""
    names = (*KEPT_FILES, "generation_config.json", INDEX)
    for path in [*(folder / name for name in names), *sorted(folder.glob("*.safetensors"))]:
        if path.is_file() and path.stat().st_size < 1024:
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise ModelError(
                        f"{path}: is a git-lfs pointer, not the file itself: run git lfs pull"
                    )


def check_quantized(model: str, config: dict) -> None:
    """Raise `ModelError` for a config.json with quantized weights; name the unquantized model."""
    found = next((config[key] for key in QUANTIZATIONS if config.get(key)), None)
    if found is None:
        return
    method = found.get("quant_method", "quantized") if isinstance(found, dict) else "quantized"
    width = config.get("hidden_size") or (config.get("text_config") or {}).get("hidden_size")
    original = f"Qwen/Qwen2.5-VL-{UNQUANTIZED.get(width, '7B')}-Instruct"
    raise ModelError(
        f"model {model}: its weights are quantized ({method}) and cannot be trained or merged; "
        f"use unquantized weights, such as {original}"
    )


def check_weights(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> str:
    """Return a report on a folder's weights, read from their headers.

    `expected` maps the parameter names of the model in config.json to shapes. Raises `ModelError`
    for a file that is missing, truncated or not safetensors, and for weights that are missing,
    surplus or of the wrong shape: transformers would initialize missing weights at random and
    ignore surplus ones.
    """
    found: dict[str, tuple[int, ...]] = {}
    files = weight_files(folder)
    for path in files:
        for name, shape in read_header(path):
            found[parameter_of(name)] = shape
    for name, shape in found.items():
        if name in expected and shape != expected[name]:
            raise ModelError(
                f"{folder}: {name} has shape {shape}, but config.json asks for {expected[name]}"
            )
    where = f"{folder}: weights and config.json do not match"
    if missing := sorted(expected.keys() - found.keys()):
        raise ModelError(f"{where}: {len(missing)} weights are missing, e.g. {missing[0]}")
    surplus = sorted(name for name in found if name not in expected and not is_idle(name))
    if surplus:
        raise ModelError(f"{where}: {len(surplus)} weights are not in the model, e.g. {surplus[0]}")
    return f"{len(found)} weights in {len(files)} files; names and shapes match config.json"


def parameter_of(name: str) -> str:
    """Return the parameter name of a weight in a file: published files use older names.

    >>> parameter_of("model.layers.0.mlp.up_proj.weight"), parameter_of("visual.merger.ln_q.weight")
    ('model.language_model.layers.0.mlp.up_proj.weight', 'model.visual.merger.ln_q.weight')
    """
    if name.startswith("visual."):
        return f"model.{name}"
    if re.match(r"model\.(?!language_model\.|visual\.)", name):
        return name.replace("model.", "model.language_model.", 1)
    return name


def is_idle(name: str) -> bool:
    """Return whether a weight in a file is no parameter of the model, and may be ignored.

    Such a weight is computed (rotary frequencies), tied, or a head from another trainer.
    """
    return not name.startswith("model.") or name.endswith(".inv_freq")


def weight_files(folder: Path) -> list[Path]:
    """Return the paths of a folder's weight files, which may not exist. Raises `ModelError`.

    Like transformers, prefers the single file to the files in the index.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelError(f"{folder}: has no weights: neither {WEIGHTS} nor {INDEX}")
    names = read_json(folder / INDEX).get("weight_map")
    if not (names and isinstance(names, dict) and all(isinstance(n, str) for n in names.values())):
        raise ModelError(f"{folder / INDEX}: lists no weight files")
    return [folder / name for name in sorted(set(names.values()))]


def read_header(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor in a safetensors file. Raises `ModelError`.

    The file starts with the header's length in 8 bytes, then the header, a JSON object by tensor
    name: https://github.com/huggingface/safetensors
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError("the header is too large")
            header = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size
        header.pop("__metadata__", None)
        tensors = [
            (name, *(about[key] for key in ("dtype", "shape", "data_offsets")))
            for name, about in header.items()
        ]
        ends = [8 + length + offsets[1] for *_, offsets in tensors]
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path}: damaged, or not safetensors: {first_line(error)}") from error
    if ends and size != max(ends):
        raise ModelError(f"{path}: has {size:,} bytes, its header says {max(ends):,}: truncated?")
    for name, dtype, shape, _ in tensors:
        if dtype not in FLOATS:
            raise ModelError(f"{path}: {name} has dtype {dtype}, must be one of {FLOATS}")
        yield name, tuple(shape)
