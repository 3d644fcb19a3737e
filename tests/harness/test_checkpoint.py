"""checkpoint.py: checkpoints are atomic and exact, and damage is reported."""

import json
import shutil
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import TINY, config_of

from engine.loading import load
from harness import checkpoint
from harness.checkpoint import (
    CheckpointError,
    atomic_folder,
    checkpoints_of,
    restore,
    save,
    save_final,
)
from main import make_optimizer

PARTS = {"with_optimizer": True, "with_reference": False}


def trained(dtype: str = "float32", *, updates: int = 2):
    """Return a model after some random updates, with its optimizer."""
    loaded = load(TINY, device="cpu", dtype=dtype, reference=True)
    config = config_of("--preset", "tiny", "--lr", "1e-3")
    optimizer = make_optimizer(config, loaded.policy)
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        update(loaded, optimizer, generator)
    return loaded, optimizer


def update(loaded, optimizer, generator):
    for parameter in loaded.policy.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


def fresh(dtype: str = "float32"):
    return trained(dtype, updates=0)


def assert_equal(a, b):
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(one, other)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- exact --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path, dtype):
    loaded, optimizer = trained(dtype)
    saved = save(tmp_path, loaded, optimizer, steps_done=2, keep=1, **PARTS)
    assert saved == tmp_path / "checkpoints" / "step-000002"
    again, other = fresh(dtype)
    restore(saved, again, other)
    assert_equal(again.policy, loaded.policy)
    for _ in range(2):
        update(loaded, optimizer, torch.Generator().manual_seed(7))
        update(again, other, torch.Generator().manual_seed(7))
    assert_equal(again.policy, loaded.policy)  # moments, Kahan compensation and step count
    states = zip(optimizer.state.values(), other.state.values(), strict=True)
    for one, two in states:
        assert (one["kahan_comp"] is not None) == (dtype == "bfloat16")
        assert torch.equal(one["exp_avg_sq"], two["exp_avg_sq"])


def test_which_kernel_updates_is_a_matter_of_the_machine_that_resumes(tmp_path):
    loaded, optimizer = trained("bfloat16")
    optimizer.param_groups[0]["triton"] = True
    saved = save(tmp_path, loaded, optimizer, steps_done=2, keep=1, **PARTS)
    again, other = fresh("bfloat16")
    restore(saved, again, other)
    assert other.param_groups[0]["triton"] is False


def test_weights_are_restored_in_place(tmp_path):
    loaded, optimizer = trained()
    saved = save(tmp_path, loaded, optimizer, steps_done=2, keep=1, **PARTS)
    again, other = fresh()
    places = [parameter.data_ptr() for parameter in again.policy.parameters()]
    restore(saved, again, other)
    assert [parameter.data_ptr() for parameter in again.policy.parameters()] == places


def test_a_reference_that_moves_is_part_of_the_checkpoint(tmp_path):
    loaded, optimizer = trained()
    with torch.no_grad():
        for parameter in loaded.reference.parameters():
            parameter.add_(0.5)
    parts = {"with_optimizer": True, "with_reference": True}
    saved = save(tmp_path, loaded, optimizer, steps_done=2, keep=1, **parts)
    again, other = fresh()
    restore(saved, again, other)
    assert_equal(again.reference, loaded.reference)


def test_a_checkpoint_is_a_model_folder(tmp_path):
    loaded, optimizer = trained()
    parts = {"with_optimizer": False, "with_reference": False}
    saved = save(tmp_path, loaded, optimizer, steps_done=2, keep=1, **parts)
    assert not checkpoint.has_optimizer(saved)
    assert_equal(load(str(saved), device="cpu", dtype="float32").policy, loaded.policy)


@pytest.mark.parametrize("mmap", [True, False])
def test_the_optimizer_is_a_plain_state_dict(sound, mmap):
    _, expected = trained()
    _, optimizer = fresh()
    optimizer.load_state_dict(torch.load(sound / "optimizer.pt", weights_only=True, mmap=mmap))
    for one, other in zip(optimizer.state.values(), expected.state.values(), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
        assert torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])
    assert optimizer.param_groups[0]["step"] == 2


def test_what_is_restored_no_longer_needs_the_file(sound):
    restored = fresh()
    restore(sound, *restored)
    assert "optimizer.pt" not in Path("/proc/self/maps").read_text()


def test_a_checkpoint_from_before_processes_were_counted(sound, tmp_path):
    old = Path(shutil.copytree(sound, tmp_path / "step-000002"))
    state = json.loads((old / "state.json").read_text())
    assert state.pop("processes") == 1
    (old / "state.json").write_text(json.dumps(state))
    assert restore(old, *fresh()) == 2


def test_only_the_newest_are_kept(tmp_path):
    loaded, optimizer = trained()
    for steps_done in (9, 10, 999_999, 1_000_000):
        save(tmp_path, loaded, optimizer, steps_done=steps_done, keep=2, **PARTS)
    names = [path.name for path in checkpoints_of(tmp_path)]
    assert names == ["step-999999", "step-1000000"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_optimizer", [True, False])
@pytest.mark.parametrize("with_reference", [True, False])
def test_the_room_asked_for_is_what_is_written(tmp_path, dtype, with_optimizer, with_reference):
    loaded, optimizer = trained(dtype)
    parts = {"with_optimizer": with_optimizer, "with_reference": with_reference}
    save(tmp_path, loaded, optimizer, steps_done=2, keep=1, **parts)
    written = sum(len(content) for content in tree(tmp_path).values())
    expected = checkpoint.checkpoint_bytes(loaded, **parts)
    assert written <= expected * 1.02  # with so small a model, text files count
    assert written >= expected * 0.95


# --- whole or absent ----------------------------------------------------------------------


def test_what_fails_half_way_leaves_everything_as_it_was(tmp_path):
    folder = tmp_path / "some"
    with atomic_folder(folder) as partial:
        (partial / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as partial:
        (partial / "file").write_text("new")
        _ = 1 / 0
    assert (folder / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["some"]


def test_without_room_nothing_is_written(tmp_path, monkeypatch):
    loaded, optimizer = trained()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(9, 8, 2**20))
    with pytest.raises(CheckpointError, match=r"needs 0.05 GiB, and only 0.00 GiB are free"):
        save(tmp_path, loaded, optimizer, steps_done=2, keep=1, **PARTS)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, file_size_limit):
    loaded, optimizer = trained()
    before = save(tmp_path, loaded, optimizer, steps_done=2, keep=1, **PARTS)
    content = tree(tmp_path)
    for limit in (1_000, 1_000_000, 20_000_000):  # in config.json, weights, optimizer
        with file_size_limit(limit), pytest.raises(CheckpointError):
            save(tmp_path, loaded, optimizer, steps_done=3, keep=1, **PARTS)
        with file_size_limit(1_000), pytest.raises(CheckpointError):
            save_final(tmp_path, loaded, steps_done=3)
        assert tree(tmp_path) == content
    restore(before, *fresh())


@pytest.fixture(params=[True, False])
def crc32(request):
    """Whether torch.save writes a crc32, before and after a checkpoint is saved."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(request.param)
    yield request.param
    torch.serialization.set_crc32_options(before)


@pytest.mark.parametrize("problem", [None, OSError("disk full")])
def test_crc32_is_left_out_and_stays_as_it_was_set(tmp_path, monkeypatch, crc32, problem):
    def saving(*arguments):
        seen.append(torch.serialization.get_crc32_options())
        if problem:
            raise problem
        write(*arguments)

    seen, write = [], torch.save
    loaded, optimizer = trained()
    monkeypatch.setattr(torch, "save", saving)
    with pytest.raises(CheckpointError, match="disk full") if problem else nullcontext():
        save(tmp_path, loaded, optimizer, steps_done=2, keep=1, **PARTS)
    assert seen == [False]
    assert torch.serialization.get_crc32_options() == crc32


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_policy_gone_wrong_does_not_take_the_place_of_a_good_one(tmp_path, value):
    loaded, optimizer = trained()
    save(tmp_path, loaded, optimizer, steps_done=2, keep=1, **PARTS)
    before = tree(tmp_path)
    with torch.no_grad():
        loaded.policy.lm_head.weight[3, 5] = value
    with pytest.raises(CheckpointError, match="not finite"):
        save(tmp_path, loaded, optimizer, steps_done=3, keep=1, **PARTS)
    with pytest.raises(CheckpointError, match="not finite"):
        save_final(tmp_path, loaded, steps_done=3)
    assert tree(tmp_path) == before


# --- damage -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    loaded, optimizer = trained()
    return save(folder, loaded, optimizer, steps_done=2, keep=1, **PARTS)


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda at: (at / "state.json").unlink(), "state.json"),
        (lambda at: (at / "state.json").write_text("[]"), "state.json"),
        (lambda at: (at / "state.json").write_text('{"steps_done": 2'), "state.json"),
        (lambda at: (at / "model.safetensors").unlink(), "damaged"),
        (lambda at: (at / "model.safetensors").write_bytes(b"{}"), "damaged"),
        (lambda at: flip(at / "model.safetensors", 0.7), "checksum of the policy"),
        (lambda at: (at / "optimizer.pt").write_bytes(b"PK\x03\x04"), "damaged"),
        (lambda at: flip(at / "optimizer.pt", 0.1), "checksum of the optimizer"),
        (lambda at: flip(at / "optimizer.pt", 0.5), "checksum of the optimizer"),
        (lambda at: flip(at / "optimizer.pt", 0.9), "checksum of the optimizer"),
    ],
)
def test_damage_is_told(sound, tmp_path, damage, told):
    shutil.copytree(sound, tmp_path / "step-000002")
    damage(tmp_path / "step-000002")
    with pytest.raises(CheckpointError, match=told) as refusal:
        restore(tmp_path / "step-000002", *fresh())
    assert len(str(refusal.value).splitlines()) == 1


class Evil:
    def __reduce__(self):
        return (print, ("foreign code has run",))


def test_no_code_of_others_is_run(sound, tmp_path, capsys):
    shutil.copytree(sound, tmp_path / "step-000002")
    torch.save({"state": Evil(), "param_groups": []}, tmp_path / "step-000002" / "optimizer.pt")
    with pytest.raises(CheckpointError, match="damaged"):
        restore(tmp_path / "step-000002", *fresh())
    assert "foreign code" not in capsys.readouterr().out


def test_another_reference_is_refused(sound):
    loaded, optimizer = fresh()
    with torch.no_grad():
        next(loaded.reference.parameters()).view(-1)[0].add_(1.0)
    with pytest.raises(CheckpointError, match="not the model that this run started from"):
        restore(sound, loaded, optimizer)


def test_the_checksum_sees_every_bit():
    tensors = [torch.randn(3, 5), torch.randn(7).bfloat16()]
    before = checkpoint.checksum(tensors)
    tensors[1].view(torch.int16)[3] ^= 1
    assert checkpoint.checksum(tensors) != before
    assert checkpoint.checksum([]) == 0


def test_what_a_killed_process_left_is_cleared(tmp_path):
    for name in (".final.partial", "checkpoints/.step-000002.partial", "checkpoints/.x.deleted"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000001").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({}))
    checkpoint.clear_leftovers(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["checkpoints", "checkpoints/step-000001", "config.json"]
