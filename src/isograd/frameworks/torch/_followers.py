"""What a program does once for each optimizer step: schedulers, `GradScaler.update`, averaged weights.

After a step that was left out they are held back, as if its batch had not existed. What follows epochs is not: it is
told from the others by its optimizer having stepped more than once since it was last called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch._effects import parameters_of


class Followers:
    """Holds back what follows the steps that were left out. `listen` and `stop` put the taps in and take them out."""

    def __init__(self) -> None:
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._seen: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._left_out: WeakKeyDictionary[Optimizer, bool | Tensor] = WeakKeyDictionary()
        self._scaled_left_out = False
        self._undo: list[Callable[[], None]] = []

    def stepped(self, optimizer: Optimizer, *, left_out: bool | Tensor) -> None:
        """An optimizer has stepped, or its step was left out. Where only the device knows, whoever follows the step
        waits for it.
        """
        self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        self._left_out[optimizer] = left_out

    def _is_left_out(self, optimizer: Optimizer | None) -> bool:
        return optimizer is not None and bool(self._left_out.get(optimizer, False))

    def keep_scale(self) -> None:
        """The next `GradScaler.update` is that of a batch that was left out."""
        self._scaled_left_out = True

    # ---- taps -----------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Hold back from now on."""
        for cls in _classes(LRScheduler):
            if "step" in vars(cls):
                self._replace(cls, "step", self._tap_scheduler)
        self._replace(torch.amp.GradScaler, "update", self._tap_update)
        self._replace(AveragedModel, "update_parameters", self._tap_average)

    def stop(self) -> None:
        """Hold nothing back any more."""
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: Any, name: str, tap: Callable[[Any], Any]) -> None:
        self._undo.append(taps.replace(owner, name, tap))

    def _tap_scheduler(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if self._holds(scheduler):
                return None
            return original(scheduler, *args, **kwargs)

        return step

    def _holds(self, scheduler: Any) -> bool:
        optimizer = getattr(scheduler, "optimizer", None)
        steps = self._steps.get(optimizer, 0) if isinstance(optimizer, Optimizer) else 0
        keeps_pace = self._keeps_pace(scheduler, steps)
        is_ready = hasattr(scheduler, "_last_lr")  # it steps once when it is made
        return keeps_pace and is_ready and bool(self._undo) and self._is_left_out(optimizer)

    def _keeps_pace(self, follower: Any, steps: int, at_most: int = 1) -> bool:
        """Whether it is called with every step, not once an epoch: there has been one since its last call."""
        last, self._seen[follower] = self._seen.get(follower, 0), steps
        return steps - last <= at_most

    def _tap_update(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def update(scaler: Any, *args: Any, **kwargs: Any) -> Any:
            held, self._scaled_left_out = self._scaled_left_out and bool(self._undo), False
            tensors = [t for t in (scaler._scale, scaler._growth_tracker) if t is not None] if held else []
            before = [tensor.clone() for tensor in tensors]
            original(scaler, *args, **kwargs)  # it also forgets which optimizers have stepped
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)

        return update

    def _tap_average(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def update_parameters(averaged: Any, model: nn.Module) -> Any:
            mine = {id(parameter) for parameter in model.parameters()}
            theirs = [one for one in list(self._left_out) if any(id(p) in mine for p in parameters_of(one))]
            keeps_pace = self._keeps_pace(averaged, sum(self._steps[one] for one in theirs), len(theirs))
            held = keeps_pace and any(map(self._is_left_out, theirs))
            return None if held and self._undo else original(averaged, model)

        return update_parameters


def _classes(base: type[Any]) -> Iterator[type[Any]]:
    """A class and everything derived from it, each once."""
    seen: set[type[Any]] = set()
    waiting = [base]
    while waiting:
        cls = waiting.pop()
        if cls not in seen:
            seen.add(cls)
            yield cls
            waiting += cls.__subclasses__()
