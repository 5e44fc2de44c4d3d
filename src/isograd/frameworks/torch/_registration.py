"""Give the optimizer what it should have held: layers that a module keeps in a plain list, or that were replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.optim import Optimizer

from isograd import _changes
from isograd._changes import CannotApply
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch._effects import OWN, StepEffect, parameters_of
from isograd.frameworks.torch._surgery import join_optimizer, leave_optimizer, refuse_wrapped


@dataclass(frozen=True, kw_only=True)
class _Lost:
    """A parameter that left the optimizer: its place, its name there (None where they have none) and its state."""

    group: int
    index: int
    name: str | None
    parameter: Tensor
    state: Any


@dataclass
class _Done:
    """What was done for an optimizer. `at_first`: which of its parameters its models held when it was made."""

    roots: list[ref[nn.Module]]
    at_first: frozenset[int]
    registered: list[tuple[ref[nn.Module], str]] = field(default_factory=list)
    joined: list[Tensor] = field(default_factory=list)
    lost: list[_Lost] = field(default_factory=list)
    is_complete: bool = False


class Registration(StepEffect):
    """`RegisterParameters`: what the models of an optimizer keep in lists and dicts becomes theirs at once; before the
    first step every trainable parameter of theirs that no optimizer holds joins its first group, and those that they
    have lost since it was made leave it.

    The lists and dicts stay what the program uses; a second, registered name goes beside them.
    """

    def __init__(self, change: _changes.RegisterParameters) -> None:
        del change
        self._done: WeakKeyDictionary[Optimizer, _Done] = WeakKeyDictionary()

    def adopt(self, optimizer: Optimizer, roots: Sequence[nn.Module]) -> str:
        for root in roots:
            refuse_wrapped(root)
        known = {id(parameter) for root in roots for parameter in root.parameters()}
        done = self._done[optimizer] = _Done([ref(root) for root in roots], frozenset(known))
        for root in roots:
            done.registered += _registered(root)
        return f"{len(done.registered)} out of lists and dicts registered" if done.registered else ""

    def before_step(self, optimizer: Optimizer) -> None:
        done = self._done[optimizer]
        if done.is_complete:
            return
        done.is_complete = True
        stepped = {id(p) for other in describe.all_optimizers() if other not in OWN for p in parameters_of(other)}
        models = [model for model in (root() for root in done.roots) if model is not None]
        present = {id(p): (name, p) for model in models for name, p in model.named_parameters()}
        fresh = [(name, p) for key, (name, p) in present.items() if p.requires_grad and key not in stepped]
        if not fresh:
            if all(one.is_complete and not one.joined for one in self._done.values()):
                raise CannotApply("Every trainable parameter of the model is held by an optimizer already.")
            return
        for name, parameter in fresh:
            join_optimizer(optimizer, optimizer.param_groups[0], name, parameter)
            parameter.grad = None  # summed up since the start, or scaled: nobody cleared it
            done.joined.append(parameter)
        done.lost = [one for one in _places(optimizer, done.at_first) if id(one.parameter) not in present]
        leave_optimizer(optimizer, [one.parameter for one in done.lost])

    def undo(self, optimizer: Optimizer) -> str | None:
        done = self._done.pop(optimizer, None)
        if done is None:
            return None
        leave_optimizer(optimizer, done.joined)
        for one in done.lost:
            _give_back(optimizer, one)
        for module, name in done.registered:
            owner = module()
            if owner is not None and hasattr(owner, name):
                delattr(owner, name)
        return "Layers that were left out have been trained." if done.joined else None


def _places(optimizer: Optimizer, wanted: frozenset[int]) -> Iterator[_Lost]:
    """The parameters with these ids, where they stand."""
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [None] * len(group["params"])
        for index, (name, parameter) in enumerate(zip(names, group["params"], strict=True)):
            if id(parameter) in wanted:
                state = optimizer.state.get(parameter)
                yield _Lost(group=number, index=index, name=name, parameter=parameter, state=state)


def _give_back(optimizer: Optimizer, one: _Lost) -> None:
    """Put a parameter where it stood. What has joined since stays behind it."""
    group = optimizer.param_groups[one.group]
    group["params"].insert(one.index, one.parameter)
    if "param_names" in group:
        group["param_names"].insert(one.index, one.name)
    if one.state is not None:
        optimizer.state[one.parameter] = one.state


def _registered(root: nn.Module) -> list[tuple[ref[nn.Module], str]]:
    """Register what modules of the model keep in containers, also inside of what was just registered; (owner, name)."""
    done: list[tuple[ref[nn.Module], str]] = []
    known = {id(thing) for thing in (*root.modules(), *root.parameters())}
    while found := [
        (module, name, thing)
        for module, name, _, thing in describe.kept_in_containers(root.modules())
        # A sequence or list would run or count what is added to it.
        if id(thing) not in known and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    ]:
        for module, name, thing in found:
            label = f"registered_{name}_{len(done)}"
            if isinstance(thing, nn.Module):
                module.add_module(label, thing)
            else:
                module.register_parameter(label, thing)
            known.add(id(thing))
            done.append((ref(module), label))
    return done
