"""Every GPU code path, run from start to end on a pretended GPU (pretended_gpu.py).

The pretended GPU computes nothing. The tests show that the host code works, from the command line
to the last file; that no tensor is on the wrong device; where and how often the host waits.
"""

import dataclasses
import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import TINY, config_of
from pretended_gpu import FAST_FORMS, DeviceTensor, PretendedGPU, pin_memory
from transformers import (
    AutoConfig,
    AutoProcessor,
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

import cold_start
import evaluate
import main
from engine import attention, fastpath, sampling
from warmup.answers import Flaws
from warmup.lessons import Lessons

FLAGS = "--preset tiny --device cuda --steps 1 --prompts-per-step 2 --group-size 2 --image-size 56"
FLAGS += " --max-new-tokens 20 --eval-every 0 --save-every 0 --sample-every 1000 --decay-steps 0"
RUNS = {
    "defaults": [],
    "no-reference": ["--beta", "0", "--checkpoint-layers", "2"],
    "adapters": ["--lora-rank", "2", "--micro-batch", "1"],
    "moving-reference": ["--sync-reference-every", "1", "--inner-epochs", "2"],
    "frozen-tower": ["--freeze-vision", "--checkpoint-layers", "1"],
    "two-workers": ["--workers", "2", "--steps", "2"],
    "evaluated": ["--eval-every", "1", "--eval-examples", "3"],
}


def on_gpu(work, *arguments, **options) -> PretendedGPU:
    """Run `work` on a pretended GPU; a fast path that fails its check is an error."""
    fastpath.VERDICTS.clear()
    with (
        mock.patch.dict(os.environ, clear=False),
        warnings.catch_warnings(),
        PretendedGPU(**options) as gpu,
    ):
        os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
        warnings.filterwarnings("error", message="running slower without")
        work(list(arguments))
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    gpu.verdicts = dict(fastpath.VERDICTS)
    fastpath.VERDICTS.clear()
    return gpu


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """The FLAGS with a model of two layers: more layers do not change where the host waits."""
    folder = tmp_path_factory.mktemp("model")
    config = AutoConfig.from_pretrained(TINY)
    config.text_config.update({"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    config.vision_config.update({"depth": 2, "fullatt_block_indexes": [1]})
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(TINY)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(TINY).save_pretrained(folder)
    return [*FLAGS.split(), "--model", str(folder)]


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory) -> dict[str, PretendedGPU]:
    """One short run for each of the RUNS, in the folder `runs["folder"]`."""
    folder = tmp_path_factory.mktemp("runs")
    ran = {"folder": folder}
    for name, more in RUNS.items():
        ran[name] = on_gpu(main.main, *flags, "--runs", str(folder), "--name", name, *more)
    return ran


@pytest.mark.parametrize("name", RUNS)
def test_a_run_reaches_its_end(runs, name):
    assert (runs["folder"] / name / "final").is_dir()
    assert runs[name].allocated == 0  # nothing is left on the GPU
    assert runs[name].verdicts == dict.fromkeys(FAST_FORMS, True)


@pytest.mark.parametrize("name", RUNS)
def test_where_the_host_waits_the_line_says_so(runs, name):
    assert runs[name].unmarked_reads() == []


def test_how_often_the_host_waits_in_a_step(flags, tmp_path):
    """Counts reads by statement, in the second of two steps, after all checks have run."""
    reads, uploads = [], []
    for steps in ("1", "2"):
        more = ["--runs", str(tmp_path), "--name", steps, "--steps", steps]
        gpu = on_gpu(main.main, *flags, *more, rows_finish=False)
        reads.append(gpu.reads)
        uploads.append(gpu.uploads)
    of_a_step = Counter({text.splitlines()[0]: n for (_, text), n in (reads[1] - reads[0]).items()})
    assert uploads[0] == uploads[1]  # the host never waits for an upload
    assert of_a_step == {
        "if self.finished.all():  # host sync": 2,  # after 8 and 16 of 20 tokens
        "lengths = mask.sum(1).tolist()  # host sync": 1,
        "ids = completions.ids.tolist()  # host sync": 1,
        "wrong += [name for name, number in numbers.items() if not number.isfinite()]"
        "  # host sync": 2,
        "numbers = {name: float(value) for name, value in stats.items()}  # host sync": 8,
        "truncated=rollout.truncated.tolist(),  # host sync": 1,
    }


@pytest.mark.parametrize("name", ["adapters", "moving-reference"])
def test_a_run_is_resumed(runs, name):
    folder = runs["folder"] / name
    gpu = on_gpu(main.main, "--resume", str(folder), "--steps", "2")
    assert gpu.unmarked_reads() == []
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


@pytest.mark.parametrize("name", ["evaluated", "adapters"])
def test_a_run_is_evaluated(runs, name, tmp_path):
    flags = ["--device", "cuda", "--examples", "3", "--batch-size", "2", "--max-new-tokens", "4"]
    run, picture = str(runs["folder"] / name), str(tmp_path / "picture.png")
    gpu = on_gpu(evaluate.main, run, *flags, "--plot", picture)
    assert gpu.unmarked_reads() == []
    assert Path(picture).exists()


def test_a_model_is_warmed_up(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("warmup.stages.HELD_OUT", 2)
    some = ["--speak-steps", "2", "--batch-size", "2", "--image-size", "56"]
    gpu = on_gpu(cold_start.main, "--model", flags[-1], "--out", str(tmp_path / "warm"), *some)
    assert gpu.unmarked_reads() == []
    assert (tmp_path / "warm" / "model.safetensors").exists()


def test_a_new_model_goes_through_all_stages(tmp_path, monkeypatch):
    """But for transformers' `generate`, which judges the first one, and prints tensors."""
    monkeypatch.setattr("warmup.stages.HELD_OUT", 2)
    monkeypatch.setattr("warmup.stages.share_calculated", lambda *_: 1.0)
    flags = ["--batch-size", "2", "--image-size", "56"]
    for stage in ("calculate", "see", "speak", "stumble"):
        flags += [f"--{stage}-steps", "1"]
    monkeypatch.setattr(cold_start, "ROUNDS", 1)
    for check in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        # torch's AdamW asks the driver; torch 2.11 has the second name
        monkeypatch.setattr(torch.optim.Optimizer, check, lambda self: None, raising=False)
    gpu = on_gpu(cold_start.main, "--from-scratch", "--out", str(tmp_path / "new"), *flags)
    assert gpu.unmarked_reads() == []
    assert (tmp_path / "new" / "model.safetensors").exists()


def test_weights_in_fp32(flags, tmp_path):
    """Flash attention and the AdamW kernel need bf16."""
    gpu = on_gpu(main.main, *flags, "--dtype", "float32", "--runs", str(tmp_path))
    checked = {sampling.COMPILED, sampling.CAPTURED, attention.DECODING}
    assert gpu.verdicts == dict.fromkeys(checked, True)


# --- fast paths ---------------------------------------------------------------------------


def test_no_form_is_checked_inside_of_a_layer(flags, tmp_path, monkeypatch):
    """If the layer is compiled, captured or recomputed, the check would become part of it."""
    inside = []
    forward = Qwen2_5_VLDecoderLayer.forward

    def noting(self, *arguments, **options):
        inside.append(1)
        out = forward(self, *arguments, **options)
        inside.pop()
        return out

    def verify(name, check):
        assert name in fastpath.VERDICTS or not inside, f"{name} is checked inside a layer"
        return stock(name, check)

    stock = fastpath.verify
    monkeypatch.setattr(Qwen2_5_VLDecoderLayer, "forward", noting)
    for module in (attention, fastpath, sampling):
        monkeypatch.setattr(module, "verify", verify)
    more = ["--beta", "0", "--checkpoint-layers", "2", "--runs", str(tmp_path)]
    gpu = on_gpu(main.main, *flags, *more)
    assert gpu.verdicts == dict.fromkeys(FAST_FORMS, True)


def no_compiler(*_, **__):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def no_kernel(*_, **__):
    raise RuntimeError("No available kernel. Aborting execution.")


@pytest.mark.parametrize(
    ("form", "module", "name", "failing"),
    [
        (fastpath.TRITON, sys.modules["optimi.adam"], "_triton_adam", no_compiler),
        (sampling.COMPILED, sampling, "compile_layer", no_compiler),
        (sampling.CAPTURED, torch.cuda, "graph", no_kernel),
        (fastpath.FP32_OUTPUT, fastpath, "check_matmul", no_kernel),
        (attention.FLASH, attention, "causal_lower_right", no_kernel),
        (attention.DECODING, attention, "check_one_token_attention", no_kernel),
    ],
)
def test_a_run_goes_on_without_a_form_that_fails_at_its_first_use(
    flags, tmp_path, form, module, name, failing
):
    """A kernel may fail to compile at its first use, or may not support the GPU."""

    def work(arguments):
        told_once = pytest.warns(UserWarning, match=f"running slower without {form}: RuntimeError")
        with mock.patch.object(module, name, failing), told_once as told:
            main.main(arguments)
        assert len([each for each in told if "slower" in str(each.message)]) == 1

    gpu = on_gpu(work, *flags, "--runs", str(tmp_path), "--name", "run")
    assert (tmp_path / "run" / "final").is_dir()
    assert gpu.verdicts == dict.fromkeys(FAST_FORMS, True) | {form: False}


# --- the pretended GPU --------------------------------------------------------------------


def test_the_gpu_takes_tensors_and_gives_back_what_has_no_value():
    with PretendedGPU() as gpu:
        x = torch.ones(3, 4, device="cuda", requires_grad=True)
        y = (x.to(torch.bfloat16) * torch.arange(4).to("cuda")).sum()
        y.backward()
        assert x.grad.device == torch.device("cuda", 0)
        assert gpu.reads == {}
        assert [y.item(), y.bool().item(), x.long()[0].tolist()] == [0.0, True, [7] * 4]
        assert sum(gpu.reads.values()) == 3
    assert not torch.ones(3).is_cuda
    with pytest.raises(RuntimeError, match="outlived"):
        x + 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + torch.ones(4),
        lambda x: torch.cat([x, torch.ones(1)]),
        lambda x: x.index_select(0, torch.tensor([1])),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, x[0]),
        lambda x: x.uniform_(generator=torch.Generator("cpu")),
        lambda x: x[None] @ x.bfloat16()[:, None],
        lambda x: x.nonzero(),
    ],
)
def test_the_gpu_refuses_what_a_gpu_refuses_and_what_has_no_known_shape(wrong):
    with (
        PretendedGPU(),
        pytest.raises(
            RuntimeError, match=r"same device|depends on values|tensor's device|one dtype"
        ),
    ):
        wrong(torch.ones(4, device="cuda"))


def test_the_gpu_counts_what_is_alive():
    with PretendedGPU(context_gib=0) as gpu:
        x = torch.empty(256, 1024, device="cuda")  # 1 MiB
        views = [x[:2], x.T, x.detach()]
        assert gpu.allocated == 2**20
        y = x + 1
        assert torch.cuda.mem_get_info()[0] == 140 * 2**30 - 2 * 2**20
        del x, y
        assert (gpu.allocated, gpu.peak) == (2**20, 2 * 2**20)
        del views
        assert (gpu.allocated, gpu.peak) == (0, 2 * 2**20)


def test_a_read_while_a_graph_is_recorded_is_refused():
    with PretendedGPU():
        x = torch.ones(4, device="cuda")
        with (
            pytest.raises(RuntimeError, match="when stream is capturing"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            x.sum().item()
        assert isinstance(x + 1, DeviceTensor)


# --- batches ------------------------------------------------------------------------------


def test_all_that_a_loader_hands_over_can_be_pinned(processor):
    """Every tensor of a batch, even those that stay on the host."""
    args = cold_start.make_parser().parse_args(["--model", TINY, "--out", "-"])
    config = config_of("--preset", "tiny", "--prompts-per-step", "3")
    batch = main.make_batch(config, processor, 0, 0)[1]
    lesson, ids, _ = Lessons(processor, args).answers(0, Flaws())
    tensors = [x for prompts in (batch, lesson) for x in vars(prompts).values() if x is not None]
    for tensor in [*tensors, ids]:
        assert torch.equal(pin_memory(tensor), tensor)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_batches_are_pinned_for_a_gpu(processor, device):
    config = dataclasses.replace(config_of("--preset", "tiny"), device=device)
    assert main.make_batches(config, processor).pin_memory == (device == "cuda")


def test_pinning_refuses_memory_that_elements_share():
    with pytest.raises(RuntimeError, match="single memory location"):
        pin_memory(torch.ones(1, 3).expand(2, -1))
