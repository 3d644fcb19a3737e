"""Fixtures: a small random Qwen2.5-VL in fp64, and stock transformers as the reference for it."""

import copy
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from config import Config, make_config, make_parser
from engine.loading import Loaded, use_own_attention
from engine.prompts import Prompts, encode_prompts
from engine.sampling import call_layer
from engine.scoring import completion_logprobs
from rewards import SYSTEM_MESSAGE, make_prompt
from shapes import ShapeSpec, make_example

os.environ["OMP_NUM_THREADS"] = (
    "1"  # for every process that a test starts; the next line is for this one
)
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tiny")


def config_of(*flags: str) -> Config:
    """Return the options of a command line."""
    return make_config(make_parser().parse_args(flags))


def rms_norm(self, x):
    """Return the RMS norm without transformers' cast to fp32, which would hide fp64 differences."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def rotate_vision(q, k, cos, sin):
    """Return q and k rotated in fp64; transformers rotates those of the vision tower in fp32."""
    cos, sin = cos.unsqueeze(-2).double(), sin.unsqueeze(-2).double()
    half = modeling_qwen2_5_vl.rotate_half
    return tuple((x * cos + half(x) * sin).to(x.dtype) for x in (q, k))


@pytest.fixture(scope="session")
def processor():
    return AutoProcessor.from_pretrained(TINY)


@pytest.fixture
def model(processor, monkeypatch):
    """A two-layer model with weights so large that attention, images and positions matter."""
    monkeypatch.setattr(modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm, "forward", rms_norm)
    monkeypatch.setattr(modeling_qwen2_5_vl, "apply_rotary_pos_emb_vision", rotate_vision)
    config = AutoConfig.from_pretrained(TINY)
    config.text_config.update({"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    config.vision_config.update({"depth": 2, "fullatt_block_indexes": [1]})
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [2, 0]
    use_own_attention(model)
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed_tokens" in name:
                parameter.mul_(50)
            elif "lm_head" in name:
                parameter.mul_(8)
            else:
                parameter.mul_(3)
    return model


@pytest.fixture
def compiled_layer():
    """A decoder layer traced to one graph, as on a GPU, but run by the same eager operations."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(call_layer, fullgraph=True, dynamic=False, backend="aot_eager")


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def file_size_limit():
    """A context that simulates a full disk: within it, no file may exceed `size` bytes."""

    @contextmanager
    def limit(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def loaded(model, processor):
    return Loaded(model, copy.deepcopy(model).requires_grad_(False), processor)


@pytest.fixture
def prompts(processor) -> Prompts:
    """Three prompts with three different images."""
    return make_prompts(processor, 3)


def make_prompts(processor, count: int) -> Prompts:
    images = [
        make_example(ShapeSpec(), seed=1, split="train", index=i, image_size=84).image
        for i in range(count)
    ]
    return encode_prompts(processor, images, system=SYSTEM_MESSAGE, prompt=make_prompt())


def stock(model):
    """Return a copy of the model as transformers would load it, with stock attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("sdpa")
    twin.model.visual.patch_embed.proj.__class__ = torch.nn.Conv3d
    return twin


def stock_inputs(prompts: Prompts, ids, mask) -> dict:
    """Return the inputs that a plain user of transformers passes: prompts and images repeated."""
    group_size = len(ids) // len(prompts)

    def rows(tensor):
        return tensor.repeat_interleave(group_size, 0)

    prompt_mask = torch.ones_like(rows(prompts.input_ids))
    return {
        "input_ids": torch.cat([rows(prompts.input_ids), ids], 1),
        "attention_mask": torch.cat([prompt_mask, mask.long()], 1),
        "mm_token_type_ids": torch.cat([rows(prompts.mm_token_type_ids), torch.zeros_like(ids)], 1),
        "pixel_values": rows(prompts.pixel_values).flatten(0, 1),
        "image_grid_thw": rows(prompts.image_grid_thw),
    }


def stock_logits(twin, prompts: Prompts, ids, mask):
    """Return logits (B, P + C, V) from transformers' own layers on repeated prompts and images.

    Joins text and image embeddings itself: transformers treats every image token as the place of
    an image, and so refuses a sampled one. For all other tokens its forward gives the same logits
    (`test_the_reference_is_transformers_forward`).
    """
    inputs = stock_inputs(prompts, ids, mask)
    core, prompt_length = twin.model, prompts.input_ids.shape[1]
    embeds = core.get_input_embeddings()(inputs["input_ids"])
    images = core.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    in_prompt = torch.arange(embeds.shape[1]) < prompt_length
    is_image = (inputs["input_ids"] == core.config.image_token_id) & in_prompt
    embeds = embeds.masked_scatter(is_image[..., None], torch.cat(list(images.pooler_output)))
    positions, _ = core.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    hidden = core.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=inputs["attention_mask"]
    ).last_hidden_state
    return twin.lm_head(hidden)


def stock_logprobs(twin, prompts: Prompts, ids, mask, temperature: float):
    """Return log-probs (B, C) of the completions from transformers' own layers; 0 off the mask."""
    first = prompts.input_ids.shape[1] - 1
    logits = stock_logits(twin, prompts, ids, mask)[:, first:-1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(-1, ids[..., None])[..., 0] * mask


def random_completions(prompts: Prompts, *, group_size: int = 2, seed: int = 0):
    """Return ids and mask, (B, 9), of ragged right-padded completions of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(prompts) * group_size
    lengths = torch.randint(1, 10, (rows,), generator=generator)
    lengths[:2] = torch.tensor([9, 1])
    mask = torch.arange(9) < lengths[:, None]
    ids = torch.randint(10, 400, (rows, 9), generator=generator)
    return ids.masked_fill(~mask, 0), mask


def scored(model, prompts: Prompts, ids, mask, *, temperature: float = 1.0, **options):
    """Return log-probs (B, C) of the completions from the project's own pass."""
    lengths = mask.sum(1).tolist()
    options["temperature"] = temperature
    return completion_logprobs(model, prompts, ids, lengths, **options)[0]
