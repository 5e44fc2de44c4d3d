"""Step with another optimizer behind the program's own object, which keeps its identity, its groups and its state."""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isograd import _changes
from isograd._changes import CannotApply
from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch._effects import OWN, StepEffect, unscale

Group = dict[str, Any]

_acting: WeakKeyDictionary[Optimizer, Optimizer] = WeakKeyDictionary()


def acting(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps when this one is asked to: itself, but where it has been replaced."""
    return _acting.get(optimizer, optimizer)


class Delegation(StepEffect):
    """`ReplaceOptimizer`: the program's `optimizer.step` runs another optimizer's step on the same groups and state.

    Everything else stays the program's own object: `zero_grad`, `state_dict`, `param_groups` and what schedulers do
    with them. A group's hyperparameters become the new optimizer's; its learning rate stays.
    """

    def __init__(self, change: _changes.ReplaceOptimizer) -> None:
        self._change = change
        self._undo: WeakKeyDictionary[Optimizer, _Before] = WeakKeyDictionary()

    def adopt(self, optimizer: Optimizer, roots: Sequence[nn.Module]) -> str:
        with taps.silenced():
            replacement = self._make(optimizer)
        self._undo[optimizer] = _Before(optimizer)
        for group, new in zip(optimizer.param_groups, replacement.param_groups, strict=True):
            group.update({key: value for key, value in new.items() if key not in ("params", "lr")})
        optimizer.defaults.update({key: value for key, value in replacement.defaults.items() if key != "lr"})
        _acting[optimizer] = replacement
        step = Optimizer.profile_hook_step(_Step(self._make))
        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
        return f"{type(replacement).__name__} in place of {type(optimizer).__name__}"

    def _make(self, optimizer: Optimizer) -> Optimizer:
        cls: Any = getattr(torch.optim, self._change.optimizer, None)
        if not (isinstance(cls, type) and issubclass(cls, Optimizer)) or cls in (Optimizer, torch.optim.LBFGS):
            raise CannotApply(f"torch.optim has no {self._change.optimizer} that could step in its place.")
        rates = [group.get("lr", 1e-3) for group in optimizer.param_groups]
        groups = [
            {"params": list(group["params"]), "lr": lr} for group, lr in zip(optimizer.param_groups, rates, strict=True)
        ]
        constructor: Any = cls
        given = _arguments(dict(self._change.hyperparameters))
        try:
            replacement: Optimizer = constructor(groups, lr=rates[0], **given)
            OWN.add(replacement)
            return replacement
        except (TypeError, ValueError) as error:
            raise CannotApply(f"{cls.__name__} cannot take over: {error}.") from None

    def undo(self, optimizer: Optimizer) -> str | None:
        before = self._undo.pop(optimizer, None)
        if before is None:
            return None
        other, own = self._change.optimizer, type(optimizer).__name__
        has_stepped = optimizer.state is not before.state
        before.restore(optimizer)
        _acting.pop(optimizer, None)
        return f"{own} goes on with the state that it had before {other} took over." if has_stepped else None


def _arguments(hyperparameters: dict[str, float]) -> dict[str, Any]:
    """Keyword arguments: beta1 and beta2 are torch's pair `betas`; the learning rate is a change of its own."""
    given: dict[str, Any] = {name: value for name, value in hyperparameters.items() if name != "lr"}
    betas = given.pop("beta1", 0.9), given.pop("beta2", 0.999)
    if {"beta1", "beta2"} & hyperparameters.keys():
        given["betas"] = betas
    return given


class _Before:
    """What the program's optimizer was before another one stepped for it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self.defaults = dict(optimizer.defaults)
        self.state = optimizer.state
        self.step = optimizer.__dict__.get("step")

    def restore(self, optimizer: Optimizer) -> None:
        for group, before in zip(optimizer.param_groups, self.groups, strict=False):
            own: dict[str, Any] = {
                key: group[key] for key in ("params", "lr", "initial_lr", "param_names") if key in group
            }
            group.clear()
            group.update({**before, **own})
        optimizer.defaults.clear()
        optimizer.defaults.update(self.defaults)
        optimizer.state = self.state
        if self.step is None:
            del optimizer.step
        else:
            optimizer.step = self.step  # type: ignore[method-assign]


class _Step:
    """The body of the program's `optimizer.step`. The new one is made at the first step, when groups are final."""

    __name__ = "step"

    def __init__(self, make: Any) -> None:
        self._make = make
        self._replacement: Optimizer | None = None

    def __call__(self, optimizer: Optimizer, closure: Any = None) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined] # what schedulers look for
        if self._replacement is None:
            self._replacement = self._begin(optimizer)
        replacement = self._replacement
        # `load_state_dict` gives the program's object new ones.
        replacement.param_groups, replacement.state = optimizer.param_groups, optimizer.state
        unscale(optimizer)
        if _is_called_off(optimizer):
            return None
        return _plain_step(replacement)(replacement, closure)

    def _begin(self, optimizer: Optimizer) -> Optimizer:
        with taps.silenced():
            replacement: Optimizer = self._make(optimizer)
        _acting[optimizer] = replacement
        optimizer.state = defaultdict(dict, replacement.state)
        return replacement


def _plain_step(optimizer: Optimizer) -> Any:
    """The step without the hooks: those have been called for the program's own object."""
    step = type(optimizer).step
    return getattr(step, "__wrapped__", step)


def _is_called_off(optimizer: Optimizer) -> bool:
    """Whether a `GradScaler` has found an overflow and leaves it to a fused step to do nothing."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, Tensor) and bool(found_inf)
