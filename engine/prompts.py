"""Encode prompts, a question and an image each, as model inputs, and embed them.

Dimension letters are in the legend of grpo.py. All prompts of a call have the same length (one
text, one image size), so no prompt is padded.

This model uses 3-D positions (M-RoPE: time, height, width). They are built once per prompt and
passed explicitly: otherwise transformers falls back to 1-D positions, or to state that the
previous call left behind.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from torch import Tensor
from transformers import AutoImageProcessor, Qwen2VLImageProcessor
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from engine.attention import IMPLEMENTATION
from engine.model_files import ModelError, base_of, first_line, folder_on_disk

IMAGE_TYPE = 1  # of image tokens in mm_token_type_ids
PUBLISHED_PIXELS = {"shortest_edge": 3136, "longest_edge": 12_845_056}  # published models' limits


# --- encoding ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """Model inputs of Q prompts with one image each; `prompts[a:b]` selects some of them.

    Token types and grid describe the layout and stay on the host, which builds all indices from
    them: the host never waits for the device to find the image tokens.
    """

    input_ids: Tensor  # (Q, P)
    pixel_values: Tensor  # (Q, patches, values per patch)
    mm_token_type_ids: Tensor  # (Q, P), 1 for image tokens
    image_grid_thw: Tensor  # (Q, 3), patches in time, height, width
    image_features: Tensor | None = None  # (Q, visual tokens, hidden), from `encode_images`

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice) -> "Prompts":
        return Prompts(
            self.input_ids[rows],
            self.pixel_values[rows],
            self.mm_token_type_ids[rows],
            self.image_grid_thw[rows],
            None if self.image_features is None else self.image_features[rows],
        )

    def without_image_features(self) -> "Prompts":
        """Return the prompts without image features, for a model with other vision weights."""
        return replace(self, image_features=None)

    def to(self, device: str) -> "Prompts":
        """Return the prompts with ids and pixels on the device."""
        return replace(
            self,
            input_ids=send(self.input_ids, device),
            pixel_values=send(self.pixel_values, device),
        )

    def pin_memory(self) -> "Prompts":
        """Return the prompts with ids and pixels in pinned memory; the DataLoader calls this."""
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            pixel_values=self.pixel_values.pin_memory(),
        )


def encode_prompts(processor, images: list[Image.Image], *, system: str, prompt: str) -> Prompts:
    """Return model inputs on the host, one prompt per image, all with the same question.

    Raises `ValueError` if the images differ in size.
    """
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(f"all images of a call must have the same size, not {sorted(sizes)}")
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


@lru_cache(maxsize=8)
def encode_text(
    processor, system: str, prompt: str, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return token ids and token types of a prompt with an image of that size, (1, P) each.

    They depend on the arguments only, so they are cached.
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


def image_processor_of(model: str) -> Qwen2VLImageProcessor:
    """Return a model's image processor. Raises `ModelError`.

    For a model that is not on disk yet, returns one with the pixel limits of published models.
    """
    folder = folder_on_disk(base_of(model))
    if folder is None:
        return Qwen2VLImageProcessor(size=PUBLISHED_PIXELS)
    try:
        return AutoImageProcessor.from_pretrained(folder)
    except Exception as error:  # a damaged folder can raise anything
        raise ModelError(f"model {model}: cannot be loaded: {first_line(error)}") from error


def check_no_resize(processor: Qwen2VLImageProcessor, image_size: int) -> None:
    """Raise `ValueError` if the image processor would resize images of this size, in pixels.

    The encoded image, and its number of tokens, would not match the flag.
    """
    image = Image.new("RGB", (image_size, image_size))
    pictures, _ = process_vision_info([[user_turn(image, "")]])
    _, height, width = processor(images=pictures, return_tensors="pt")["image_grid_thw"][0].tolist()
    resized = (width * processor.patch_size, height * processor.patch_size)
    if resized != image.size:
        least, most = (processor.size[edge] for edge in PUBLISHED_PIXELS)
        raise ValueError(
            f"--image-size {image_size}: the model's image processor would resize it to "
            f"{resized[0]} x {resized[1]}; it accepts {least:,} to {most:,} pixels in total"
        )


# --- embedding --------------------------------------------------------------------------


def embed_prompts(model, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings (Q, P, hidden), positions (3, Q, P), first completion positions (Q, 1).

    Encodes the images unless the prompts have image features. Completion token t has position
    `first + t` on all three axes: the image's 2-D block takes fewer positions than it has tokens,
    so `first` is below P.
    """
    core, types, grid = model.model, prompts.mm_token_type_ids, prompts.image_grid_thw
    embeds = core.get_input_embeddings()(prompts.input_ids)
    features = encode_images(model, prompts).image_features.flatten(0, 1).to(embeds.dtype)
    places = (types == IMAGE_TYPE).flatten().nonzero()[:, 0]
    places = send(places, embeds.device)
    embeds = embeds.flatten(0, 1).index_copy(0, places, features).view_as(embeds)
    # only the shape of the ids matters here: the token types locate the image
    positions, delta = core.get_rope_index(torch.zeros_like(types), types, image_grid_thw=grid)
    first = types.shape[1] + delta
    return embeds, send(positions, embeds.device), send(first, embeds.device)


def encode_images(model, prompts: Prompts) -> Prompts:
    """Return the prompts with image features; unchanged if they already have them.

    Differentiable where gradients are enabled and the vision tower is trained.
    """
    if prompts.image_features is not None:
        return prompts
    core, grid = model.model, prompts.image_grid_thw
    images = core.get_image_features(
        prompts.pixel_values.flatten(0, 1), grid, **vision_layout(core.visual, grid)
    )
    return replace(prompts, image_features=torch.stack(list(images.pooler_output)))


def vision_layout(visual, grid: Tensor) -> dict[str, object]:
    """Return positions and attention windows for the patches of images, grid (images, 3).

    transformers would compute the same on the device, read it back in every block, and loop over
    the windows. Windows of equal size, as in 224-pixel images, run in one batch here.
    """
    config = visual.config
    window_index, borders = get_vision_window_index(
        grid, config.spatial_merge_size, config.window_size, config.patch_size
    )
    positions = get_vision_position_ids(grid, config.spatial_merge_size)
    layout = {
        "position_ids": send(positions, visual.device),
        "window_index": send(window_index, visual.device),
        "cu_window_seqlens": borders,  # the host reads the borders, so they stay there
        "cu_seqlens": get_vision_cu_seqlens(grid),
    }
    if config._attn_implementation == IMPLEMENTATION and len(borders.diff().unique()) == 1:
        layout["windows"] = (len(layout["cu_seqlens"]) - 1, len(borders) - 1)
        everything = borders[[0, -1]]  # no inner border: `attention` splits into `windows`
        layout |= {"cu_window_seqlens": everything, "cu_seqlens": everything}
    return layout


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on the device, without waiting for the work queued there."""
    return tensor.to(device, non_blocking=True)
