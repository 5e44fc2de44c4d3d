"""A process group of isograd's own for all ranks: only where every rank asks for it, and never a reason to hang.

Making a group waits for every rank, and so does every reduction. A program may watch on rank 0 alone, and one rank
may stop watching while the others go on: they must not wait for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from datetime import timedelta
from itertools import count

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

WAIT = 300.0
"""Seconds that the ranks may come apart: the backward pass before they come here has joined them, but on accelerators
the host of one rank may run ahead while another still reads its first data.
"""

_asked = count()


class RankGroup:
    """All ranks, on CPU."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = dist.new_group(backend="gloo")

    @classmethod
    def of_all(cls) -> RankGroup | None:
        """The group; None, on each of the ranks, where not all have asked for it within `WAIT` seconds."""
        store = dist.distributed_c10d._get_default_store()
        key = f"isograd/group/{next(_asked)}"
        verdict = "all"
        if store.add(f"{key}/ranks", 1) < dist.get_world_size():
            with contextlib.suppress(RuntimeError):  # the time is over
                store.wait([key], timedelta(seconds=WAIT))
            verdict = "some"
        # Whoever writes first decides for all: also for a rank that comes after the others have given up.
        return cls() if store.compare_set(key, "", verdict) == b"all" else None

    def reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Over all ranks, in place. Raises RuntimeError where one of them has left, or this one."""
        if self._group is None:
            raise RuntimeError("this rank has left the others")
        try:
            dist.all_reduce(values, op=operation, group=self._group)
        except RuntimeError as error:
            raise RuntimeError("another rank has stopped, or cannot be reached any more") from error

    def leave(self) -> None:
        """Close this rank's connections: the others' reductions raise from now on, where they would have waited."""
        group, self._group = self._group, None  # they are closed when nothing holds the group any more
        if group is not None:
            with contextlib.suppress(Exception):  # the program may have ended all groups before
                dist.destroy_process_group(group)


def has_uneven_inputs(modules: Iterable[nn.Module]) -> bool:
    """Whether ranks take steps while others have none left: DistributedDataParallel's `join`."""
    wrappers = [module for module in modules if isinstance(module, DistributedDataParallel)]
    return any(getattr(getattr(wrapper, "_join_config", None), "enable", False) for wrapper in wrappers)
