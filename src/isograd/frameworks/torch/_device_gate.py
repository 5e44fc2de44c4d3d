"""Decide about the steps of a fused optimizer on its own device: the host does not wait, and hears of it later.

torch's fused Adam, AdamW, SGD and Adagrad read two numbers on the device: `found_inf`, at 1 of which they leave
everything as it is, and `grad_scale`, by which they divide the gradients. They are there for `GradScaler`; here the
ranges of `_judge.py` set them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from isograd._guard import Guard
from isograd._judge import Bounds, Judge, Reading
from isograd.frameworks.torch import _kernels as kernels
from isograd.frameworks.torch._effects import parameters_of
from isograd.frameworks.torch._predicted import predicted_update
from isograd.frameworks.torch._row import Queue, Row

Heard = Callable[[Reading, Bounds], None]
"""(reading, what it was held to), once they are on the host."""

_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


def can_gate(optimizer: Optimizer) -> bool:
    """Whether its step can be decided about on the device: fused, on one device, with dense gradients and its state
    made already (a first step with momentum would leave the buffer that it makes unwritten).
    """
    parameters = [p for p in parameters_of(optimizer) if p.grad is not None]
    return (
        type(optimizer) in _FUSED
        and all(group.get("fused") for group in optimizer.param_groups)
        and bool(parameters)
        and len({parameter.device for parameter in parameters}) == 1
        and all(p.grad.layout == torch.strided and not hasattr(p, "_local_tensor") for p in parameters)  # type: ignore[union-attr]
        and all(_has_state(optimizer, parameter) for parameter in parameters)
    )


def _has_state(optimizer: Optimizer, parameter: Tensor) -> bool:
    if isinstance(optimizer, torch.optim.SGD):
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        return not group["momentum"] or optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
    return bool(optimizer.state.get(parameter))


class DeviceGate:
    """Gates the steps of one optimizer. While `is_open` every step passes."""

    def __init__(self, guard: Guard, judge: Judge) -> None:
        self._guard, self._judge = guard, judge
        self._queue = Queue()
        self._own: dict[str, Any] = {}
        self._limits: tuple[Bounds, Tensor, Tensor] | None = None
        self._row: tuple[Row, _Sent] | None = None
        self.left_out: Tensor = torch.zeros(())
        self.is_open = False

    def before_step(self, optimizer: Optimizer, losses: Sequence[Tensor]) -> None:
        """Let the step that comes pass, shrink it or leave it out."""
        parameters = parameters_of(optimizer)
        present = [index for index, parameter in enumerate(parameters) if parameter.grad is not None]
        gradients = [kernels.real(parameters[index].grad) for index in present]  # type: ignore[arg-type]
        norms = torch.stack(kernels.norms(gradients))
        device = norms.device
        loss = torch.stack([one.float().to(device) for one in losses]).sum() if losses else norms.new_full((), math.nan)
        update = predicted_update(optimizer)
        moved = norms.new_full((), math.nan) if update is None else update
        total = torch.linalg.vector_norm(norms)
        bounds, limits, ends = self._bounds(len(parameters), device)
        values = torch.cat([torch.stack([loss, total, moved]), norms])
        chosen = torch.cat([limits[:3], limits[3:][present]])
        finite = torch.isfinite(total)
        if update is not None:
            finite = finite & torch.isfinite(update)
        if losses:
            finite = finite & torch.isfinite(loss)
        above = (values > chosen).any()
        self._act(optimizer, finite, above, total, norms, ends[0], ends[1:][present])
        row = Row()
        row.put([*values.unbind()])
        sent = _Sent(present=present, bounds=bounds, has_loss=bool(losses), has_update=update is not None)
        self._row = row, sent

    def _act(
        self,
        optimizer: Optimizer,
        finite: Tensor,
        above: Tensor,
        total: Tensor,
        norms: Tensor,
        end: Tensor,
        ends: Tensor,
    ) -> None:
        one = torch.ones_like(total)
        bad, scale = ~finite | above, one
        if self._guard.clip:
            down = torch.minimum(end / total, (ends / norms).amin())
            clipped = finite & above & (down < 1)
            scale = torch.where(clipped, 1 / down, one)
            bad = bad & ~clipped
        skips = (self._guard.skip or self._guard.rewind) and not self.is_open
        self.left_out = bad.float() if skips else torch.zeros_like(total)
        self._own = {name: getattr(optimizer, name, None) for name in ("found_inf", "grad_scale")}
        optimizer.found_inf = self.left_out  # type: ignore[attr-defined]
        optimizer.grad_scale = scale if not self.is_open else one  # type: ignore[attr-defined]

    def _bounds(self, width: int, device: torch.device) -> tuple[Bounds, Tensor, Tensor]:
        """What the step is held to; sent to the device when it has changed."""
        bounds = self._judge.bounds(width)
        if self._limits is None or not _are_equal(self._limits[0], bounds):
            limits = np.concatenate([[bounds.loss, bounds.norm, bounds.update], bounds.norms])
            ends = np.concatenate([[bounds.norm_end], bounds.norm_ends])
            self._limits = bounds, _sent(limits, device), _sent(ends, device)
        return self._limits

    def let_go(self, optimizer: Optimizer) -> None:
        """Give the optimizer back as it was."""
        for name, value in self._own.items():
            if value is None:
                delattr(optimizer, name)
            else:
                setattr(optimizer, name, value)
        self._own = {}

    def after_step(self, optimizer: Optimizer, heard: Heard) -> None:
        """The optimizer has stepped, or not; `heard` is told of this and earlier steps once they are known."""
        self.let_go(optimizer)
        if self._row is not None:
            row, sent = self._row
            self._row = None
            self._queue.push(row, lambda arrived: heard(_reading(arrived, sent), sent.bounds))
        self._queue.drain()

    def drain(self) -> None:
        """Wait for what is under way."""
        self._queue.drain(everything=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sent:
    """What a row on its way to the host is about. `present`: indices of the tensors that have a gradient."""

    present: list[int]
    bounds: Bounds
    has_loss: bool
    has_update: bool


def _reading(row: Row, sent: _Sent) -> Reading:
    loss, _, moved, *norms = row[range(3 + len(sent.present))]
    width = len(sent.bounds.norms)
    lengths, counts = np.full(width, np.nan), np.zeros(width)
    lengths[sent.present] = norms
    counts[sent.present] = ~np.isfinite(norms)
    if not math.isfinite(moved):
        # Of finite gradients: the optimizer's state is broken.
        moved = math.inf if sent.has_update and not counts.any() else math.nan
    return Reading(
        loss=loss,
        loss_is_finite=not sent.has_loss or math.isfinite(loss),
        norms=np.where(counts > 0, np.inf, lengths),
        nonfinite=counts,
        update=moved,
    )


def _are_equal(one: Bounds, other: Bounds) -> bool:
    return one.norm_ends is other.norm_ends and (one.loss, one.norm, one.update) == (
        other.loss,
        other.norm,
        other.update,
    )


def _sent(values: Any, device: torch.device) -> Tensor:
    there = torch.from_numpy(np.asarray(values, dtype=np.float32))
    if device.type != "cuda":
        return there.to(device)
    return there.pin_memory().to(device, non_blocking=True)
