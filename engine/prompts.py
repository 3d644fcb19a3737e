"""Prompts: a question and a picture as model inputs, and their embeddings.

Letters are those of the legend in grpo.py. All prompts of a call are equally long (one text, one
image size), so that no prompt is padded.

Positions are 3-D in this model (M-RoPE: time, height, width). They are built once per prompt and
passed explicitly, because transformers otherwise falls back to 1-D positions, or to hidden state
left by the previous call.
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

IMAGE_TYPE = 1  # in mm_token_type_ids
PUBLISHED_PIXELS = {"shortest_edge": 3136, "longest_edge": 12_845_056}  # limits of an image


# --- encoding ---------------------------------------------------------------------------


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
    image_features: Tensor | None = (
        None  # (Q, visual tokens, hidden): what a model's `encode_images` made of them
    )

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
        """Return the prompts without what was seen: other weights must look for themselves."""
        return replace(self, image_features=None)

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


def encode_prompts(processor, images: list[Image.Image], *, system: str, prompt: str) -> Prompts:
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


# --- embedding --------------------------------------------------------------------------


def embed_prompts(model, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings (Q, P, hidden), positions (3, Q, P), first completion positions (Q, 1).

    The vision tower reads each image once, or not if it has been seen. Completion token t stands at
    `first + t` on all three axes: the image's 2-D block takes fewer positions than it has tokens,
    so `first` is below P.
    """
    core, types, grid = model.model, prompts.mm_token_type_ids, prompts.image_grid_thw
    embeds = core.get_input_embeddings()(prompts.input_ids)
    features = encode_images(model, prompts).image_features.flatten(0, 1).to(embeds.dtype)
    places = (types == IMAGE_TYPE).flatten().nonzero()[:, 0]
    places = send(places, embeds.device)
    embeds = embeds.flatten(0, 1).index_copy(0, places, features).view_as(embeds)
    # of the ids only the shape matters here: an image stands where the types say so
    positions, delta = core.get_rope_index(torch.zeros_like(types), types, image_grid_thw=grid)
    first = types.shape[1] + delta
    return embeds, send(positions, embeds.device), send(first, embeds.device)


def encode_images(model, prompts: Prompts) -> Prompts:
    """Return the prompts with what the vision tower makes of their images, if not seen already.

    Differentiable where gradients are enabled and the tower is trained.
    """
    if prompts.image_features is not None:
        return prompts
    core, grid = model.model, prompts.image_grid_thw
    images = core.get_image_features(
        prompts.pixel_values.flatten(0, 1), grid, **vision_layout(core.visual, grid)
    )
    return replace(prompts, image_features=torch.stack(list(images.pooler_output)))


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


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on the device. The host does not wait for what is queued there."""
    return tensor.to(device, non_blocking=True)
