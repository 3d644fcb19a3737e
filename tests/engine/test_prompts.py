"""prompts.py against transformers' own processor, embeddings and positions."""

import pytest
import torch
from conftest import TINY, make_prompts, stock
from transformers import AutoConfig

from engine.prompts import embed_prompts, encode_prompts, encode_text
from rewards import SYSTEM_MESSAGE, make_prompt
from shapes import ShapeSpec, make_example


def test_images_of_two_sizes_are_refused(processor):
    images = [
        make_example(ShapeSpec(), seed=0, split="train", index=0, image_size=size).image
        for size in (84, 112)
    ]
    with pytest.raises(ValueError, match="the same size"):
        encode_prompts(processor, images, system="s", prompt="p")


def test_a_224_pixel_image_is_64_tokens(processor):
    example = make_example(ShapeSpec(), seed=0, split="train", index=0)
    prompts = encode_prompts(processor, [example.image], system="s", prompt="p")
    image_token = AutoConfig.from_pretrained(TINY).image_token_id
    assert (prompts.input_ids == image_token).sum() == 64


def test_prompts_are_what_the_processor_makes_of_whole_chats(processor):
    """One tokenization serves all images; the processor gives the same for all chats at once."""
    examples = [make_example(ShapeSpec(), seed=0, split="train", index=i) for i in range(3)]
    images = [example.image for example in examples]
    chats = [
        [
            {"role": "system", "content": SYSTEM_MESSAGE},
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": make_prompt()}],
            },
        ]
        for _ in images
    ]
    text = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    whole = processor(text=text, images=images, return_tensors="pt")
    own = encode_prompts(processor, images, system=SYSTEM_MESSAGE, prompt=make_prompt())
    assert torch.equal(own.input_ids, whole["input_ids"])
    assert torch.equal(own.mm_token_type_ids, whole["mm_token_type_ids"])
    assert torch.equal(own.pixel_values.flatten(0, 1), whole["pixel_values"])
    assert torch.equal(own.image_grid_thw, whole["image_grid_thw"])


def test_the_text_is_tokenized_once(processor):
    make_prompts(processor, 2)
    before = encode_text.cache_info().misses
    make_prompts(processor, 3)
    assert encode_text.cache_info().misses == before


@pytest.mark.parametrize("size", [224, 84, 140])  # per image: 4 equal windows, 1, 4 unequal
def test_embeddings_and_positions_are_those_of_transformers(model, processor, size):
    images = [
        make_example(ShapeSpec(), seed=1, split="train", index=i, image_size=size).image
        for i in range(3)
    ]
    prompts = encode_prompts(processor, images, system=SYSTEM_MESSAGE, prompt=make_prompt())
    twin = stock(model).model
    embeds, positions, first = embed_prompts(model, prompts)
    features = twin.get_image_features(prompts.pixel_values.flatten(0, 1), prompts.image_grid_thw)
    expected = twin.get_input_embeddings()(prompts.input_ids)
    is_image = prompts.input_ids == model.config.image_token_id
    expected[is_image] = torch.cat(list(features.pooler_output))
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-12)
    stock_positions, delta = twin.get_rope_index(
        prompts.input_ids, prompts.mm_token_type_ids, image_grid_thw=prompts.image_grid_thw
    )
    assert torch.equal(positions, stock_positions)
    assert torch.equal(first, prompts.input_ids.shape[1] + delta)
    assert (delta < 0).all()  # an image takes fewer positions than it has tokens
