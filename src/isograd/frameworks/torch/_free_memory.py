"""How much memory is free, on the host and on accelerators."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Where Linux tells the limit of a container and what it uses: version 2 and version 1."""


def free_bytes(device: torch.device) -> int:
    """Bytes that nobody has asked the device for. On accelerators, those that torch has set aside count as used: the
    program has needed them before. Where a device does not tell, the host's.
    """
    module: Any = torch.get_device_module(device) if device.type not in ("cpu", "mps") else None
    if hasattr(module, "mem_get_info"):
        return int(module.mem_get_info(device)[0])
    return min(_host(), *_containers())


def _host() -> int:
    """What Linux calls available. Elsewhere half of the physical memory: how much of it is free is not told."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 1 << 31


def _containers() -> Iterator[int]:
    yield 1 << 62
    for limit, used in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            yield max(0, int(Path(limit).read_text(encoding="ascii")) - int(Path(used).read_text(encoding="ascii")))
