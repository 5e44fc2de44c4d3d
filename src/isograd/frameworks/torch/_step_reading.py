"""What a guard judges a step by, before the optimizer makes it: read once, and alike on all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer, Rprop

from isograd._judge import Floats, Reading
from isograd.frameworks.torch import _kernels as kernels
from isograd.frameworks.torch._effects import parameters_of
from isograd.frameworks.torch._parameters import ParameterReading
from isograd.frameworks.torch._predicted import predicted_update
from isograd.frameworks.torch._rank_group import RankGroup, has_uneven_inputs


class CannotAgree(Exception):
    """All ranks together cannot be guarded; a sentence why."""


class Agreement:
    """All ranks decide from the same numbers: their sums, in one small all-reduce a step. Constructing is collective.

    `sharded`: each rank holds a part of every gradient; otherwise all hold the same ones, averaged before. `width`:
    tensors that this rank's optimizer holds. Raises CannotAgree, on every rank that comes here.
    """

    def __init__(self, *, sharded: bool, width: int) -> None:
        group = RankGroup.of_all()
        if group is None:
            raise CannotAgree("not every rank guards this optimizer")
        self._group = group
        self.size, self.sharded = dist.get_world_size(), sharded
        self.overflows = 0
        self._fit(width, self.sums([width, width**2]))

    def _fit(self, width: int, sums: Floats) -> None:
        if self.size * sums[1] != sums[0] ** 2:
            raise CannotAgree("the ranks' optimizers do not hold equally many tensors")
        self._width = width

    def exchange(self, tensors: Floats, facts: Sequence[float]) -> tuple[Floats, Floats]:
        """Sums of what is said of each tensor [facts, width] and of the step. gloo aborts the program where the ranks'
        messages are not equally long, so a rank whose width has changed says that first, in as many numbers as before.
        """
        width = tensors.shape[1]
        changed = float(width != self._width)
        body = np.zeros((len(tensors), self._width)) if changed else tensors
        found = self.sums(np.concatenate([body.ravel(), facts, [changed, width, width**2]]))
        if found[-3]:
            self._fit(width, found[-2:])
            return self.exchange(tensors, facts)
        cells = len(tensors) * width
        return found[:cells].reshape(tensors.shape), found[cells:-3]

    def sums(self, values: Sequence[float] | Floats) -> Floats:
        """Sums over ranks [N]."""
        packed = torch.as_tensor(np.asarray(values, dtype=np.float64))
        self._group.reduce(packed)
        return packed.numpy()

    def smallest(self, number: int) -> int:
        """The smallest among the ranks."""
        packed = torch.tensor([number])
        self._group.reduce(packed, dist.ReduceOp.MIN)
        return int(packed)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.sums([float(flag)])[0])

    def leave(self) -> None:
        """This rank decides no more: the others are not to wait for it."""
        self._group.leave()


def read_step(
    optimizer: Optimizer,
    losses: Sequence[Tensor],
    *,
    known: ParameterReading | None = None,
    loss_scale: float = 1.0,
    agreement: Agreement | None = None,
    overflowed: bool = False,
) -> Reading:
    """The reading of a step from the losses of its backward passes and from `.grad`. `known`: what has been read of
    the gradients. `overflowed`: this rank's scaler leaves the step out. Waits for the device once, and a second time
    where something is not finite.
    """
    norms, nonfinite = _gradients(optimizer, known.gradients if known is not None else None)
    scale = getattr(optimizer, "grad_scale", None)
    if isinstance(scale, Tensor):
        norms = norms / float(scale)  # a fused step unscales inside its kernel
    update = predicted_update(optimizer)
    loss = sum(float(value) for value in losses) / loss_scale if losses else math.nan
    moved = math.nan if update is None else float(update)
    if update is not None and not math.isfinite(moved):
        moved = math.nan if nonfinite.any() else math.inf  # of finite gradients: the optimizer's state is broken
    reading = Reading(
        loss=loss,
        loss_is_finite=not losses or math.isfinite(loss),
        norms=norms,
        nonfinite=nonfinite,
        update=moved,
        sized=not isinstance(optimizer, Rprop),
    )
    return reading if agreement is None else _agreed(reading, agreement, overflowed)


def _gradients(optimizer: Optimizer, known: tuple[list[int], list[float], list[float]] | None) -> tuple[Floats, Floats]:
    """(L2 norm, entries that are not finite) of each tensor's gradient on this rank; NaN norms where there is none."""
    parameters = parameters_of(optimizer)
    present, norms, nonfinite = known if known is not None else _norms_of(parameters)
    lengths, counts = np.full(len(parameters), np.nan), np.zeros(len(parameters))
    lengths[present], counts[present] = norms, nonfinite
    for index in np.flatnonzero(np.isinf(lengths) & (counts == 0)):  # squares of finite entries have overflowed
        lengths[index] = float(torch.linalg.vector_norm(_local(parameters[index]), dtype=torch.float64))
    lengths[counts > 0] = np.inf
    return lengths, counts


def _local(parameter: Tensor) -> Tensor:
    """This rank's part of a gradient, as plain real values."""
    gradient: Any = parameter.grad
    return kernels.real(getattr(gradient, "_local_tensor", gradient))


def _norms_of(parameters: Sequence[Tensor]) -> tuple[list[int], list[float], list[float]]:
    present = [index for index, parameter in enumerate(parameters) if parameter.grad is not None]
    gradients = [_local(parameters[index]) for index in present]
    norms = _on_host(kernels.norms(gradients)) if gradients else []
    pairs = zip(gradients, norms, strict=True)
    return present, norms, [0.0 if math.isfinite(n) else float(kernels.num_nonfinite(g)) for g, n in pairs]


def _on_host(values: Sequence[Tensor]) -> list[float]:
    device = values[0].device
    found: list[float] = torch.stack([value.to(device) for value in values]).tolist()
    return found


def _agreed(reading: Reading, agreement: Agreement, overflowed: bool) -> Reading:
    """The reading of all ranks together: what any of them finds bad is bad for all."""
    finite = np.where(np.isfinite(reading.norms), reading.norms, 0.0)
    huge = np.isinf(reading.norms) & (reading.nonfinite == 0)
    facts = [
        0.0 if not math.isfinite(reading.loss) else reading.loss,
        float(math.isnan(reading.loss) and reading.loss_is_finite),
        float(not reading.loss_is_finite),
        0.0 if math.isnan(reading.update) else reading.update**2,
        float(math.isnan(reading.update)),
        float(overflowed),
    ]
    tensors, sums = agreement.exchange(np.stack([finite**2, np.isnan(reading.norms), reading.nonfinite, huge]), facts)
    squares, missing, nonfinite, overflown = tensors
    loss, unseen, bad_losses, moved, unknown, overflows = sums
    agreement.overflows = int(overflows)
    share = 1.0 if agreement.sharded else 1.0 / agreement.size
    norms = np.where(overflown + nonfinite > 0, np.inf, np.sqrt(squares * share))
    return Reading(
        loss=math.nan if unseen or bad_losses else loss / agreement.size,
        loss_is_finite=not bad_losses,
        norms=np.where(missing == agreement.size, np.nan, norms),
        nonfinite=nonfinite,
        update=math.nan if unknown else math.sqrt(moved * share),
        sized=reading.sized,
    )


def needs_agreement(roots: Sequence[Any], parameters: Sequence[Tensor]) -> str:
    """How ranks hold the model that they train together, "replicated" or "sharded"; "" where this process trains alone,
    or a sentence why a guard cannot act there.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ""
    meshes = {parameter.device_mesh for parameter in parameters if hasattr(parameter, "device_mesh")}
    if any(mesh.ndim > 1 for mesh in meshes) or len(meshes) > 1:
        return "parameters are sharded over several dimensions, which a guard does not support yet"
    if meshes and next(iter(meshes)).size() != dist.get_world_size():
        return "parameters are sharded over some of the ranks, which a guard does not support"
    if meshes:
        whole = all(_is_shard(parameter) for parameter in parameters if parameter.requires_grad)
        return "sharded" if whole else "only some of the parameters are sharded, which a guard does not support"
    return _replication([module for root in roots for module in root.modules()])


def _replication(modules: Sequence[Any]) -> str:
    groups = [module.process_group for module in modules if isinstance(module, DistributedDataParallel)]
    if not groups:
        return "several processes train and none of DistributedDataParallel and fully_shard joins them"
    if any(group.size() != dist.get_world_size() for group in groups):
        return "DistributedDataParallel joins some of the ranks only, which a guard does not support"
    if has_uneven_inputs(modules):
        return "within `join` some ranks take more steps than others, and no step is decided about together"
    return "replicated"


def _is_shard(parameter: Any) -> bool:
    return hasattr(parameter, "placements") and all(placement.is_shard() for placement in parameter.placements)
