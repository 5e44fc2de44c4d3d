"""Under data parallelism every rank must record the same numbers: what is rank-local is reduced here.

Gradients, weights and updates are equal on all ranks already (DistributedDataParallel averages them). Losses, timings
and everything read from activations are local; they are summed or maximized over a process group of our own, on CPU, in
the order of the steps, so that decisions made from them (which step is deep) agree as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from isograd._history import Floats
from isograd.frameworks.torch._rank_group import RankGroup


def rank() -> int:
    """This process's rank; 0 where there is one process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes of the job; 1 where there is one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Ranks:
    """Reductions over all ranks."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self.size = dist.get_world_size()

    def leave(self) -> None:
        """This rank reduces no more: the others are not to wait for it."""
        self._group.leave()

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks; NaN counts as nothing to add, and is returned where no rank had a value."""
        return self._reduce(values, 0.0, dist.ReduceOp.SUM)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Maxima over ranks, NaN left out likewise."""
        return self._reduce(values, -torch.inf, dist.ReduceOp.MAX)

    def smallest(self, values: Sequence[float]) -> list[float]:
        """Minima over ranks, NaN left out likewise."""
        return [-value for value in self.largest([-value for value in values])]

    def agree(self, number: int) -> bool:
        """Whether all ranks hold the same number."""
        low, high = self.largest([float(-number), float(number)])
        return -low == high

    def _reduce(self, values: Sequence[float], neutral: float, operation: dist.ReduceOp.RedOpType) -> list[float]:
        local = torch.tensor(list(values), dtype=torch.float64, device="cpu")
        present = ~torch.isnan(local)
        packed = torch.where(present, local, torch.full_like(local, neutral))
        counts = present.double()
        self._group.reduce(packed, operation)
        self._group.reduce(counts)
        result: list[float] = torch.where(counts > 0, packed, torch.full_like(packed, torch.nan)).tolist()
        return result


def combine(ranks: Ranks, arrays: dict[str, Any]) -> dict[str, Any]:
    """Layer statistics [layers] of all ranks together, as one process with the whole batch would have read them.

    Local losses are averaged over ranks by DistributedDataParallel, so signals are divided by the number of ranks.
    """
    sizes = arrays["output_size"]
    mean, rms, std = arrays["output_mean"], arrays["output_rms"], arrays["output_std"]
    slope, signal = arrays["activation_slope"], arrays["signal_norm"] / ranks.size
    sums = {name: ranks.total(arrays[name]) for name in _SUMMED}
    weight = np.asarray(sums["output_size"])

    def averaged(values: Any) -> Any:
        weights = np.where(np.isnan(values), np.nan, sizes).tolist()
        return np.asarray(ranks.total(values * sizes)) / np.asarray(ranks.total(weights))

    combined: dict[str, Any] = {name: np.asarray(values) for name, values in sums.items()}
    combined["calls"] = combined["calls"] / ranks.size
    combined["output_mean"] = averaged(mean)
    combined["output_rms"] = np.sqrt(np.asarray(ranks.total(np.square(rms) * sizes)) / weight)
    second = averaged(np.square(std) + np.square(mean))
    combined["output_std"] = np.sqrt(np.maximum(second - np.square(averaged(np.where(np.isnan(std), np.nan, mean))), 0))
    combined["activation_slope"] = np.sqrt(averaged(np.square(slope)))
    combined["signal_norm"] = np.sqrt(np.asarray(ranks.total(np.square(signal))))
    combined["signal_max"] = np.asarray(ranks.largest(arrays["signal_max"])) / ranks.size
    combined |= {name: averaged(arrays[name]) for name in _AVERAGED}
    combined |= {name: np.asarray(ranks.largest(arrays[name])) for name in _LARGEST}
    combined |= {name: np.asarray(ranks.smallest(arrays[name])) for name in _SMALLEST}
    return combined


def replica_difference(ranks: Ranks, norms: Floats, nonfinite: Floats) -> Floats:
    """How far apart the ranks' norms of each parameter are, over the largest one; 1 where only some are finite."""
    if not ranks.agree(len(norms)):
        return np.full(len(norms), np.nan)
    checksums = np.where(nonfinite > 0, np.inf, norms)
    low, high = (np.asarray(found) for found in (ranks.smallest(checksums.tolist()), ranks.largest(checksums.tolist())))
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = np.where(np.isinf(high), 1.0, (high - low) / high)
    return np.where(high == low, 0.0, apart)


_SUMMED = ("calls", "output_size", "output_nonfinite", "input_nonfinite", "signal_nonfinite")
_AVERAGED = (
    "output_zero_fraction", "saturation", "attention_entropy", "padding_fraction", "signal_zero_fraction",
    "row_similarity", "batch_statistics_gap",
)  # fmt: skip
_LARGEST = ("output_max", "row_sum_max", "attention_logit_max", "column_scale_ratio", "distinct_values")
_SMALLEST = ("output_min", "row_sum_min", "dead_fraction")
