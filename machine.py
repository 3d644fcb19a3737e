"""What this machine lets the process have: memory under the container's limit, and its cores."""

from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
FILES = {  # of version 2 and 1: limit, use, and what of the use is page cache that can go
    "memory.max": ("memory.current", "inactive_file"),
    "memory.limit_in_bytes": ("memory.usage_in_bytes", "total_inactive_file"),
}


def free_host_memory() -> tuple[int, int]:
    """Return the bytes of host memory that this process can still use, and all it may have.

    In a container, or under a batch system, that is less than the machine has.
    """
    machine = psutil.virtual_memory()
    limits = cgroup_limits()
    free = min([machine.available, *(limit - used for limit, used in limits)])
    return max(0, free), min([machine.total, *(limit for limit, _ in limits)])


def cgroup_limits(own: Path = OWN_CGROUPS, root: Path = CGROUPS) -> list[tuple[int, int]]:
    """Return limit and use, in bytes, of every control group with a limit that holds this process.

    A limit may be set on the group itself or on any above it. Both versions of control groups are
    read: https://docs.kernel.org/admin-guide/cgroup-v2.html, .../cgroup-v1/memory.html
    """
    found = []
    for line in read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        lowest = top / path.lstrip("/")
        for folder in (lowest, *lowest.parents):
            if folder.is_relative_to(top):
                found += limit_of(folder)
    return found


def limit_of(folder: Path) -> list[tuple[int, int]]:
    """Return the limit and the use of one control group, if it has a limit."""
    for limit_file, (use_file, idle_row) in FILES.items():
        limit, used = read(folder / limit_file).strip(), read(folder / use_file).strip()
        if limit.isdigit() and used.isdigit():  # without a limit it says "max"
            rows = dict(line.split() for line in read(folder / "memory.stat").splitlines())
            return [(int(limit), max(0, int(used) - int(rows.get(idle_row, 0))))]
    return []


def read(path: Path) -> str:
    """Return what a file holds; nothing where there is none, as outside of Linux."""
    try:
        return path.read_text()
    except OSError:
        return ""
