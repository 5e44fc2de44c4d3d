"""Factors on the program's own learning rate: those of torch's schedulers, run on an optimizer of nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as schedulers

from isograd import _changes
from isograd._changes import CannotApply, SetHyperparameter
from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch._effects import OWN


class Multiplier(Protocol):
    """What a learning rate becomes, step after step."""

    def begin(self, rates: Sequence[float]) -> None:
        """These are the rates that the program's groups start from."""

    def rate(self, index: int, own: Any) -> Any:
        """The rate of a group for this step in place of the program's own."""

    def see_loss(self, tensors: Sequence[Tensor]) -> None:
        """A backward pass from these begins."""

    def advance(self) -> None:
        """The step is over."""


class Rescaled:
    """A factor; or a value, which is the factor value / (first rate of the group), so that schedules keep their shape.

    A group whose first rate is 0 gets the value itself.
    """

    def __init__(self, *, value: float | None = None, factor: float | None = None) -> None:
        self._value, self._factor = value, factor
        self._first: dict[int, float] = {}

    def begin(self, rates: Sequence[float]) -> None:
        self._first = dict(enumerate(rates)) | self._first

    def rate(self, index: int, own: Any) -> Any:
        if self._value is None:
            return own * self._factor
        first = self._first.setdefault(index, float(own))
        return own * (self._value / first) if first else self._value

    def see_loss(self, tensors: Sequence[Tensor]) -> None:
        return None

    def advance(self) -> None:
        return None


class Constant:
    """The largest rate that the program has set so far: it may rise, as in a warm-up, and never falls again."""

    def __init__(self) -> None:
        self._largest: dict[int, float] = {}

    def begin(self, rates: Sequence[float]) -> None:
        self._largest = dict(enumerate(rates)) | self._largest

    def rate(self, index: int, own: Any) -> Any:
        largest = self._largest[index] = max(float(own), self._largest.get(index, 0.0))
        return torch.full_like(own, largest) if isinstance(own, Tensor) else largest

    def see_loss(self, tensors: Sequence[Tensor]) -> None:
        return None

    def advance(self) -> None:
        return None


class Scheduled:
    """A scheduler of torch on an optimizer without weights whose own rate is 1."""

    def __init__(self, make: Callable[[Optimizer], Any], steps: int | None) -> None:
        self._optimizer = _optimizer_of_nothing()
        self._scheduler = make(self._optimizer)
        self._left = math.inf if steps is None else steps

    def begin(self, rates: Sequence[float]) -> None:
        return None

    def rate(self, index: int, own: Any) -> Any:
        return own * self._optimizer.param_groups[0]["lr"]

    def see_loss(self, tensors: Sequence[Tensor]) -> None:
        return None

    def advance(self) -> None:
        if self._left > 0:  # cosine would rise again behind its end
            self._left -= 1
            self._optimizer._opt_called = True  # type: ignore[attr-defined] # schedulers warn where no step came first
            self._scheduler.step()


class Plateau:
    """`ReduceLROnPlateau` on the running mean of the loss, with one tenth of `steps` as memory and as patience."""

    def __init__(self, factor: float, steps: int) -> None:
        self._memory = max(1, steps // 10)
        self._optimizer = _optimizer_of_nothing()
        self._scheduler = schedulers.ReduceLROnPlateau(self._optimizer, factor=factor, patience=self._memory)
        self._loss, self._mean = math.nan, math.nan

    def begin(self, rates: Sequence[float]) -> None:
        return None

    def rate(self, index: int, own: Any) -> Any:
        return own * self._optimizer.param_groups[0]["lr"]

    def see_loss(self, tensors: Sequence[Tensor]) -> None:
        self._loss = sum(float(tensor.detach().sum()) for tensor in tensors)

    def advance(self) -> None:
        if math.isfinite(self._loss):
            old = self._loss if math.isnan(self._mean) else self._mean
            self._mean = old + (self._loss - old) / self._memory
            self._scheduler.step(self._mean)


def _optimizer_of_nothing() -> SGD:
    with taps.silenced():
        optimizer = SGD([torch.zeros(1)], lr=1.0)
        OWN.add(optimizer)
    return optimizer


def multiplier_of(change: SetHyperparameter | _changes.ScheduleLearningRate) -> Multiplier:
    """The multiplier of a change. Raises CannotApply for what torch's scheduler does not take."""
    if isinstance(change, SetHyperparameter):
        return Rescaled(value=change.value, factor=change.factor)
    if change.shape == "constant":
        return Constant()
    try:
        if change.shape == "plateau":
            return Plateau(change.end or 0.1, change.steps)
        return Scheduled(*_scheduler(change))
    except (ValueError, ZeroDivisionError) as error:
        raise CannotApply(f"This schedule does not exist: {error}.") from None


def _scheduler(change: _changes.ScheduleLearningRate) -> tuple[Callable[[Optimizer], Any], int | None]:
    """(how to make the scheduler, the steps after which it stands still). A factor of 0 that would end training or
    that has no meaning is taken as torch's 0.1 ("step") or as 0.001 ("exponential").
    """
    steps, end = change.steps, change.end
    made: dict[str, tuple[Callable[[Optimizer], Any], int | None]] = {
        "warm-up": (lambda o: schedulers.LinearLR(o, start_factor=1 / steps, total_iters=steps), steps),
        "linear": (lambda o: schedulers.LinearLR(o, start_factor=1.0, end_factor=end, total_iters=steps), steps),
        "step": (lambda o: schedulers.StepLR(o, step_size=steps, gamma=end or 0.1), None),
        "exponential": (lambda o: schedulers.ExponentialLR(o, gamma=max(end, 1e-3) ** (1 / steps)), steps),
        "inverse-sqrt": (lambda o: schedulers.LambdaLR(o, lambda t: math.sqrt(steps / max(steps, t + 1))), None),
        "cosine": (lambda o: schedulers.CosineAnnealingLR(o, T_max=steps, eta_min=end), steps),
    }
    return made[change.shape]
