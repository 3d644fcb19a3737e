"""warmup/models.py: the tokenizer and the sizes of new models, and the bundled one."""

from pathlib import Path

import pytest
from conftest import TINY

from engine.sizes import empty_model, numel
from warmup import models
from warmup.models import tiny_tokenizer


def test_the_tokenizer_splits_digits_and_loses_nothing():
    tokenizer = tiny_tokenizer()
    assert tokenizer.tokenize("1234.50") == ["1", "2", "3", "4", ".", "5", "0"]
    for text in ("<answer>12.50</answer>", "größer ٤ 面积\n\t🙂", "You read geometric"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_bundled_tokenizer_is_the_one_that_is_made(processor):
    assert tiny_tokenizer().get_vocab() == processor.tokenizer.get_vocab()


def test_the_bundled_model_is_small():
    folder = Path(TINY)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000_000
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 4_115_648), ("small", 163_717_632)])
def test_the_sizes_from_scratch(size, parameters, monkeypatch):
    monkeypatch.setattr(models, "Qwen2_5_VLForConditionalGeneration", empty_model)
    monkeypatch.setattr(models, "use_own_attention", lambda model: None)
    assert numel(models.new_model(0, size).policy) == parameters
