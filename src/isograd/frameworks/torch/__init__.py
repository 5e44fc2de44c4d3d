"""PyTorch: observe a training program."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import multiprocessing, nn
from torch.optim import Optimizer

from isograd.frameworks.torch._apply import Applier as Applier
from isograd.frameworks.torch._flight import FlightRecorder as FlightRecorder
from isograd.frameworks.torch._guarding import Guarding as Guarding
from isograd.frameworks.torch._initialization import initialize as initialize
from isograd.frameworks.torch._observe import Observer as Observer
from isograd.frameworks.torch._ranks import rank as rank
from isograd.frameworks.torch._ranks import world_size as world_size
from isograd.frameworks.torch._rehearsal import Rehearsal as Rehearsal
from isograd.frameworks.torch._rehearsal import random_batch as random_batch
from isograd.frameworks.torch._rehearsal import rehearsing as rehearsing
from isograd.frameworks.torch._rehearsal import require_model as require_model
from isograd.frameworks.torch._seed import preserved_generators as preserved_generators
from isograd.frameworks.torch._seed import seed_generators as seed_generators
from isograd.frameworks.torch._seed import shift_seeds as shift_seeds
from isograd.frameworks.torch._structure import structure_of as structure_of


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


def sort(things: Iterable[object]) -> tuple[tuple[nn.Module, ...], tuple[Optimizer, ...], tuple[object, ...]]:
    """(modules, optimizers, others that have a state) among `things`. Raises ValueError for anything else."""
    several = tuple(things)
    for thing in several:
        if not (callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))):
            raise ValueError(f"watch() takes torch modules and optimizers, not {type(thing).__name__}")
    models = tuple(thing for thing in several if isinstance(thing, nn.Module))
    optimizers = tuple(thing for thing in several if isinstance(thing, Optimizer))
    return models, optimizers, tuple(thing for thing in several if not isinstance(thing, (nn.Module, Optimizer)))


def set_threads(threads: int) -> None:
    """Let this process compute on so many threads."""
    torch.set_num_threads(threads)


def wrap_spawned(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """From now on `torch.multiprocessing.spawn` and `start_processes` run `wrap(function)` in their processes."""
    # `torch.multiprocessing.spawn` is a function; the module of that name is where it looks up `start_processes`.
    spawning: Any = sys.modules["torch.multiprocessing.spawn"]
    original = spawning.start_processes

    def start_processes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return original(wrap(fn), *args, **kwargs)

    namespaces: tuple[Any, ...] = (spawning, multiprocessing)
    for namespace in namespaces:
        namespace.start_processes = start_processes
