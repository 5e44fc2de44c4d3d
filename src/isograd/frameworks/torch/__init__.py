"""PyTorch: observe a training program."""

from __future__ import annotations

import os
from typing import Any

import torch

from isograd.frameworks.torch._observe import Observer as Observer
from isograd.frameworks.torch._ranks import rank as rank
from isograd.frameworks.torch._ranks import world_size as world_size


def describe_run() -> dict[str, Any]:
    """Facts about this process that a run file keeps: torch's version, device, rank and world size.

    Before `init_process_group` the launcher's environment (`RANK`, `WORLD_SIZE` of torchrun) says the rank.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "torch": str(torch.__version__),
        "device": str(accelerator or "cpu"),
        "rank": rank() or int(os.environ.get("RANK", "0")),
        "world_size": max(world_size(), int(os.environ.get("WORLD_SIZE", "1"))),
        "threads": torch.get_num_threads(),
    }
