"""The parts of a training program as they are at one moment, each with its way back: modules, optimizers, loss scalers
and whatever has a `state_dict`. Each takes its tensors into an inventory; the copies are made for all together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch._delegation import acting
from isograd.frameworks.torch._effects import OWN, parameters_of
from isograd.frameworks.torch._pieces import pieces
from isograd.frameworks.torch._tensor_copies import DoesNotFit, Inventory, Place, Return, num_infinite

Infinite = dict[tuple[int, str], int]
"""(identity of a module, name) -> how many entries were infinite when it was first seen: masks hold -Inf for good."""


class Part(Protocol):
    """One part of a program as it was: made while the inventory is taken."""

    def put_back(self, back: Return) -> None: ...


class ModulePart:
    """The parameters and buffers of one module, without its children."""

    def __init__(self, module: nn.Module, inventory: Inventory, infinite: Infinite) -> None:
        self._module = weakref.ref(module)
        self._parameters: dict[str, Place] = {}
        for name, tensor in module._parameters.items():
            if tensor is not None:
                first = 0 if tensor.requires_grad else _infinite_at_first(module, name, tensor, infinite)
                self._parameters[name] = inventory.place(tensor, first)
        self._buffers = {
            name: inventory.plan(tensor, _infinite_at_first(module, name, tensor, infinite))
            for name, tensor in module._buffers.items()
        }

    def put_back(self, back: Return) -> None:
        module = self._module()
        if module is None:
            return
        parameters, buffers = dict(module._parameters.items()), dict(module._buffers.items())
        for name, place in self._parameters.items():
            if not back.put_into(parameters.get(name), place):
                raise DoesNotFit(f"{type(module).__name__}.{name} is not the tensor that it was.")
        for name, then in self._buffers.items():
            put = back.put(buffers.get(name), then)
            # A table that has grown since: the program counts on its size and does not call it state.
            if put is not buffers.get(name) and name not in module._non_persistent_buffers_set:
                back.then(partial(module._buffers.__setitem__, name, put))


def _infinite_at_first(module: nn.Module, name: str, tensor: Tensor | None, infinite: Infinite) -> int:
    key = id(module), name
    if key not in infinite and tensor is not None:
        infinite[key] = sum(num_infinite(piece) for piece in pieces(tensor) if piece.is_floating_point())
    return infinite.get(key, 0)


_PASSING = frozenset({"grad_scale", "found_inf"})
"""What a loss scaler hands to a fused step for its duration."""


class OptimizerPart:
    """The hyperparameters and the state of one optimizer, its parameters where no module holds them, and numbers that
    a class of the program's own keeps beside.
    """

    def __init__(self, optimizer: Optimizer, inventory: Inventory) -> None:
        self._optimizer, self._acting = optimizer, type(acting(optimizer))
        self._parameters = [(parameter, inventory.place(parameter)) for parameter in parameters_of(optimizer)]
        self._groups = [
            inventory.plan({key: value for key, value in group.items() if key != "params"})
            for group in optimizer.param_groups
        ]
        self._state = [(key, inventory.plan(held)) for key, held in optimizer.state.items()]
        self._own = {name: inventory.plan(value) for name, value in _own_numbers(optimizer)}

    def put_back(self, back: Return) -> None:
        if type(acting(self._optimizer)) is not self._acting:
            raise DoesNotFit(f"{self._acting.__name__} does not step any more.")
        for parameter, place in self._parameters:
            if not back.put_into(parameter, place):
                raise DoesNotFit("A parameter of the optimizer is not the tensor that it was.")
        for group, then in zip(self._optimizer.param_groups, self._groups, strict=False):
            _put_entries(back, group, then)
        self._put_back_state(back)
        _put_entries(back, vars(self._optimizer), self._own)

    def _put_back_state(self, back: Return) -> None:
        state: dict[Any, Any] = self._optimizer.state
        known = {id(key) for key, _ in self._state}
        # The state of parameters that were added since stays.
        given = {id(parameter) for parameter, _ in self._parameters}
        for key in state:
            if id(key) not in known and (id(key) in given or not isinstance(key, Tensor)):
                back.then(partial(state.pop, key))
        for key, then in self._state:
            held = state.get(key)
            if isinstance(held, dict) and isinstance(then, dict):
                for name in held.keys() - then.keys():
                    back.then(partial(held.pop, name))
                _put_entries(back, held, then)
            else:
                back.then(partial(state.__setitem__, key, back.put(None, then)))


def _put_entries(back: Return, held: MutableMapping[str, Any], then: Mapping[str, Any]) -> None:
    for name, value in then.items():
        back.then(partial(held.__setitem__, name, back.put(held.get(name), value)))


def _own_numbers(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """Counters, tensors and containers of them among the attributes of an optimizer that is not torch's."""
    if type(optimizer).__module__.startswith("torch."):
        return
    given = {id(parameter) for parameter in parameters_of(optimizer)}
    for name, value in vars(optimizer).items():
        if name not in _attributes_of_all() and name not in _PASSING and _is_numbers(value, given):
            yield name, value


@cache
def _attributes_of_all() -> frozenset[str]:
    """Attributes that every optimizer has. Making one imports a second's worth of torch, which programs that train
    have done by then.
    """
    with taps.silenced():
        optimizer = torch.optim.SGD([torch.zeros(())])
        OWN.add(optimizer)
    return frozenset(vars(optimizer))


def _is_numbers(value: Any, parameters: Container[int]) -> bool:
    """Whether it holds nothing but numbers and tensors, and none of the parameters themselves."""
    if type(value) is dict:
        return all(_is_numbers(entry, parameters) for entry in value.values())
    if type(value) in (list, tuple):
        return all(_is_numbers(entry, parameters) for entry in value)
    return isinstance(value, (int, float, Tensor)) and id(value) not in parameters


class ScalerPart:
    """A loss scaler, without a wait for its numbers."""

    _NUMBERS = ("_init_scale", "_init_growth_tracker", "_growth_factor", "_backoff_factor", "_growth_interval")

    def __init__(self, scaler: GradScaler, inventory: Inventory) -> None:
        self._scaler = weakref.ref(scaler)
        self._numbers = {name: getattr(scaler, name) for name in self._NUMBERS}
        self._scale = inventory.plan(scaler._scale)
        self._tracker = inventory.plan(scaler._growth_tracker)

    def put_back(self, back: Return) -> None:
        scaler = self._scaler()
        if scaler is None:
            return
        back.then(partial(vars(scaler).update, self._numbers))
        self._put(back, "_scale", self._scale, self._numbers["_init_scale"])
        self._put(back, "_growth_tracker", self._tracker, self._numbers["_init_growth_tracker"])

    def _put(self, back: Return, name: str, then: Any, first: float) -> None:
        scaler = self._scaler()
        now = getattr(scaler, name)
        # It stays where it has come to be since: in the middle of a step the scaler asks for it.
        if then is None and now is not None:
            back.then(partial(now.fill_, first))
        else:
            back.then(partial(setattr, scaler, name, back.put(now, then)))


class KeeperPart:
    """A scheduler, or a thing of the program's own: what its `state_dict` holds. `find` is how to come by the thing,
    None once it is gone.
    """

    def __init__(self, find: Callable[[], Any], inventory: Inventory) -> None:
        self._find = find
        # A best loss of infinity is no fault of the training.
        self._state = inventory.plan(find().state_dict(), None)

    def put_back(self, back: Return) -> None:
        thing = self._find()
        if thing is not None:
            back.then(partial(thing.load_state_dict, back.put(None, self._state)))
