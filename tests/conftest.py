"""A small random Qwen2.5-VL in fp64, and stock transformers as the reference beside it."""

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
    "1"  # of each process that a test starts, and of each that runs tests
)
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tiny")


def config_of(*flags: str) -> Config:
    """The options of a command line."""
    return make_config(make_parser().parse_args(flags))


def rms_norm(self, x):
    """The formula without the rounding to fp32 inside, which would hide what fp64 can show."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def rotate_vision(q, k, cos, sin):
    """Likewise: transformers rotates the vision tower's queries and keys in fp32."""
    cos, sin = cos.unsqueeze(-2).double(), sin.unsqueeze(-2).double()
    half = modeling_qwen2_5_vl.rotate_half
    return tuple((x * cos + half(x) * sin).to(x.dtype) for x in (q, k))


@pytest.fixture(scope="session")
def processor():
    return AutoProcessor.from_pretrained(TINY)


@pytest.fixture
def model(processor, monkeypatch):
    """Two layers, random weights large enough for attention, images and positions to matter."""
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
    """A decoder layer as one graph, as on a GPU, run by the same operations as without."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(call_layer, fullgraph=True, dynamic=False, backend="aot_eager")


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def file_size_limit():
    """A disk that fills up: no file may grow beyond so many bytes in the block."""

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
    """Three prompts with three different images, pixel values in fp64."""
    return make_prompts(processor, 3)


def make_prompts(processor, count: int) -> Prompts:
    images = [
        make_example(ShapeSpec(), seed=1, split="train", index=i, image_size=84).image
        for i in range(count)
    ]
    return encode_prompts(processor, images, system=SYSTEM_MESSAGE, prompt=make_prompt())


def stock(model):
    """A copy of the model as transformers would load it, with attention of its own."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("sdpa")
    twin.model.visual.patch_embed.proj.__class__ = torch.nn.Conv3d
    return twin


def stock_inputs(prompts: Prompts, ids, mask) -> dict:
    """What a plain user of transformers passes: every prompt and image repeated G times."""
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
    """Logits (B, P + C, V) by transformers' own layers on plain repeats of prompts and images.

    Word and image embeddings are joined here, because transformers takes every image token for an
    image's place and so refuses one that was sampled. For all others it gives the same
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
    """Log-probs (B, C) of the completions by transformers' own layers; zero off the mask."""
    first = prompts.input_ids.shape[1] - 1
    logits = stock_logits(twin, prompts, ids, mask)[:, first:-1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(-1, ids[..., None])[..., 0] * mask


def random_completions(prompts: Prompts, *, group_size: int = 2, seed: int = 0):
    """Ragged completions of 1 to 9 tokens, right-padded: ids and mask, (B, 9)."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(prompts) * group_size
    lengths = torch.randint(1, 10, (rows,), generator=generator)
    lengths[:2] = torch.tensor([9, 1])
    mask = torch.arange(9) < lengths[:, None]
    ids = torch.randint(10, 400, (rows, 9), generator=generator)
    return ids.masked_fill(~mask, 0), mask


def scored(model, prompts: Prompts, ids, mask, *, temperature: float = 1.0, **options):
    """Log-probs (B, C) of the completions by the project's own pass."""
    lengths = mask.sum(1).tolist()
    options["temperature"] = temperature
    return completion_logprobs(model, prompts, ids, lengths, **options)[0]
