"""Give the optimizer what it should have held: layers that a module keeps in a plain list, or that were replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.optim import Optimizer

from isograd import _changes
from isograd._changes import CannotApply
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch._effects import OWN, StepEffect, parameters_of
from isograd.frameworks.torch._surgery import join_optimizer


@dataclass
class _Held:
    """What was done for an optimizer."""

    roots: list[ref[nn.Module]]
    back: ExitStack = field(default_factory=ExitStack)
    is_complete: bool = False


class Registration(StepEffect):
    """`RegisterParameters`: lists and dicts of modules become `ModuleList` and `ModuleDict` at once; before the first
    step every trainable parameter of the optimizer's models that no optimizer holds joins its first group.
    """

    def __init__(self, change: _changes.RegisterParameters) -> None:
        del change
        self._held: WeakKeyDictionary[Optimizer, _Held] = WeakKeyDictionary()

    def adopt(self, optimizer: Optimizer, roots: Sequence[nn.Module]) -> str:
        held = self._held[optimizer] = _Held([ref(root) for root in roots])
        count = 0
        for root in roots:
            for module, name, container in list(_containers(root)):
                held.back.callback(partial(_put_back, module, name, vars(module)[name]))
                setattr(module, name, container)
                count += 1
        return f"{count} lists and dicts registered" if count else ""

    def before_step(self, optimizer: Optimizer) -> None:
        held = self._held[optimizer]
        if held.is_complete:
            return
        held.is_complete = True
        stepped = {id(p) for other in describe.all_optimizers() if other not in OWN for p in parameters_of(other)}
        models = [model for model in (root() for root in held.roots) if model is not None]
        fresh = {
            id(parameter): (name, parameter)
            for model in models
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in stepped
        }
        if not fresh:
            raise CannotApply("Every trainable parameter of the model is held by an optimizer already.")
        join_optimizer(optimizer, optimizer.param_groups[0], fresh.values(), held.back)

    def undo(self, optimizer: Optimizer) -> str | None:
        held = self._held.pop(optimizer, None)
        if held is None:
            return None
        held.back.close()
        return "Layers that were left out have been trained." if held.is_complete else None


def _containers(root: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(module, attribute, what it should be) for each list, tuple and dict of modules that the model does not hold."""
    known = set(root.modules())
    own = vars(nn.Module())
    for module in root.modules():
        for name, value in vars(module).items():
            if name in own:
                continue
            values = list(value.values()) if isinstance(value, dict) else value
            if not isinstance(values, (list, tuple)) or not values or not all(isinstance(v, nn.Module) for v in values):
                continue
            if known.issuperset(values):  # another way to what is registered
                continue
            if not isinstance(value, dict):
                yield module, name, nn.ModuleList(values)
            elif all(isinstance(key, str) for key in value):
                yield module, name, nn.ModuleDict(value)


def _put_back(module: nn.Module, name: str, value: Any) -> None:
    delattr(module, name)
    setattr(module, name, value)
