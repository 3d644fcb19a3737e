"""machine.py: the limits of containers, in files laid out as the kernel lays them out."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import machine
from machine import cgroup_limits, free_host_memory

MIB = 2**20


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


def limits(tmp_path: Path, own: str, files: dict[str, object]) -> list[tuple[int, int]]:
    (tmp_path / "cgroup").write_text(own)
    write(tmp_path / "fs", files)
    return cgroup_limits(tmp_path / "cgroup", tmp_path / "fs")


def test_version_1_as_docker_mounts_it(tmp_path):
    """In the container the group's own path is not there; its files are on top."""
    files = {
        "memory/memory.limit_in_bytes": 600 * MIB,
        "memory/memory.usage_in_bytes": 250 * MIB,
        "memory/memory.stat": f"cache {80 * MIB}\ntotal_inactive_file {50 * MIB}",
    }
    own = "11:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n"
    assert limits(tmp_path, own, files) == [(600 * MIB, 200 * MIB)]


def test_version_2_with_a_limit_above(tmp_path):
    """SLURM limits the job, and not the step in it."""
    files = {
        "job/memory.max": 900 * MIB,
        "job/memory.current": 300 * MIB,
        "job/memory.stat": f"anon 1\ninactive_file {100 * MIB}",
        "job/step/memory.max": "max",
        "job/step/memory.current": 10 * MIB,
        "other/memory.max": MIB,
        "other/memory.current": 0,
    }
    assert limits(tmp_path, "0::/job/step\n", files) == [(900 * MIB, 200 * MIB)]


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert limits(tmp_path, "", {}) == []
    assert cgroup_limits(tmp_path / "nothing", tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([], (500, 1000)),
        ([(800, 600)], (200, 800)),
        ([(800, 100)], (500, 800)),  # the machine itself has less free
        ([(800, 600), (700, 650)], (50, 700)),
        ([(2**63 - 4096, 600)], (500, 1000)),  # version 1's way to say: none
        ([(100, 120)], (0, 100)),
    ],
)
def test_the_least_of_machine_and_groups_counts(monkeypatch, groups, expected):
    memory = SimpleNamespace(available=500, total=1000)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(machine, "cgroup_limits", lambda: groups)
    assert free_host_memory() == expected
