"""How much memory there is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

_ROOT = Path("/")


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated on the device now.

    On a GPU, what torch holds without using it included; on a CPU, no more than the limits of control groups around this
    process leave, as containers and batch systems set them.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([_free_of_the_machine(), *_free_of_groups()])


def _free_of_the_machine() -> int:
    try:
        fields = dict(line.split(":") for line in (_ROOT / "proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_of_groups() -> Iterator[int]:
    """What each control group around this process may still take; pages of files are given back when asked for."""
    try:
        memberships = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = _ROOT / "sys/fs/cgroup" / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        # Inside of a container the path may be the host's, of which only the root is mounted.
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            folder = mount / group.relative_to("/")
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # not mounted, or no limit
                continue
            files = sum(int(stat.get(f"total_{kind}", stat.get(kind, 0))) for kind in ("active_file", "inactive_file"))
            yield max(0, limit - used + files)
