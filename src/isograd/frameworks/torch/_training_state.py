"""Everything that training changes in a program, and how to put it back: parameters, buffers, optimizers with their
schedulers and loss scalers, averaged weights, and what else the program hands over.

Gradients are no part of it: the next backward pass makes new ones. Nor are plain attributes of modules.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from isograd.frameworks.torch import _generators as states
from isograd.frameworks.torch._effects import parameters_of
from isograd.frameworks.torch._state_parts import (
    Infinite,
    KeeperPart,
    ModulePart,
    OptimizerPart,
    Part,
    ScalerPart,
)
from isograd.frameworks.torch._tensor_copies import Inventory, Return, copies, num_bytes, opaque_in


@dataclass(frozen=True, kw_only=True, eq=False)
class Captured:
    """A program's state at one moment: copies of the tensors, and the parts that say where they belong."""

    parts: tuple[Part, ...]
    sources: tuple[Part, ...]
    generators: states.Generators
    tensors: list[Tensor]

    @property
    def num_bytes(self) -> int:
        """Memory of the copies; the generators' states, some kilobytes on the host, apart."""
        return sum(map(num_bytes, self.tensors))


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """A program's state, looked at and not copied yet. For use at once: it holds the program's own tensors."""

    inventory: Inventory
    parts: tuple[Part, ...]
    sources: tuple[Part, ...]

    def captured(self, into: Sequence[Tensor] | None = None) -> Captured:
        """A copy, made on the devices of the tensors; in the memory of former copies, which are alike."""
        tensors = self.inventory.tensors
        return Captured(
            parts=self.parts,
            sources=self.sources,
            generators=_generators(tensors),
            tensors=copies(tensors, into),
        )


class TrainingState:
    """What these models and optimizers consist of, and what belongs to them: averages of the models, schedulers and
    optimizers inside the optimizers, loss scalers. `others` is whatever has `state_dict` and `load_state_dict`; those
    of them that can be iterated over are sources of data.

    All of these are held weakly but for what is given.
    """

    def __init__(
        self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer], others: Sequence[object] = ()
    ) -> None:
        self.optimizers = list(with_inner(optimizers))
        self._models = [*models, *(thing for thing in others if isinstance(thing, nn.Module))]
        self._others = [thing for thing in others if not isinstance(thing, nn.Module)]
        self._infinite: Infinite = {}
        self._found: list[weakref.ref[Any]] = []
        self.find()

    def find(self) -> None:
        """Look for schedulers, loss scalers and averages among everything alive: 0.1 s for 300,000 things."""
        known = {id(thing) for thing in (*self._models, *self._others)}
        self._found = [weakref.ref(thing) for thing in self._alive() if id(thing) not in known]
        self._modules(Inventory())  # what is infinite from the start is noted

    def _alive(self) -> Iterator[Any]:
        kinds: dict[type, str] = {}  # there are far fewer classes than things
        for thing in gc.get_objects():
            kind = kinds.get(cls := type(thing))
            if kind is None:
                kind = kinds[cls] = _kind(cls)
            if kind and self._belongs(thing, kind):
                yield thing

    def _belongs(self, thing: Any, kind: str) -> bool:
        if kind == "scheduler":
            scheduled = getattr(thing, "optimizer", None)
            return any(scheduled is optimizer for optimizer in self.optimizers)
        if kind == "average":
            return any(_averages(thing, model) for model in self._models)
        return bool(thing.is_enabled())

    def survey(self) -> Survey:
        """What there is now. Raises whatever a `state_dict` of the program's own raises."""
        inventory = Inventory()
        found = [(ref, thing) for ref in self._found if (thing := ref()) is not None]
        parts: list[Part] = self._modules(inventory)
        parts += [OptimizerPart(optimizer, inventory) for optimizer in self.optimizers]
        parts += [ScalerPart(thing, inventory) for _, thing in found if _kind(type(thing)) == "scaler"]
        parts += [KeeperPart(ref, inventory) for ref, thing in found if _kind(type(thing)) == "scheduler"]
        sources: list[Part] = []
        with self._preserved_generators(inventory.tensors):
            for thing in self._others:
                (sources if _is_source(thing) else parts).append(KeeperPart(_Held(thing), inventory))
        return Survey(inventory=inventory, parts=tuple(parts), sources=tuple(sources))

    def _modules(self, inventory: Inventory) -> list[Part]:
        averages = [thing for ref in self._found if isinstance(thing := ref(), nn.Module)]
        modules = {id(module): module for root in (*self._models, *averages) for module in root.modules()}
        return [ModulePart(module, inventory, self._infinite) for module in modules.values()]

    @contextlib.contextmanager
    def _preserved_generators(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Whatever the program's own methods draw inside, its generators stand afterwards where they stood."""
        held = _generators(tensors) if self._others else None
        try:
            yield
        finally:
            if held is not None:
                states.restore(held)

    def objection(self) -> str:
        """Why this program's state cannot be copied, in one sentence; "" where it can."""
        modules = [module for root in self._models for module in root.modules()]
        tensors = [
            *(p for m in modules for p in m._parameters.values()),
            *(p for o in self.optimizers for p in parameters_of(o)),
        ]
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in modules):
            return "FullyShardedDataParallel moves parameters between storages: only fully_shard can be rewound."
        if any(_is_elsewhere(tensor) for tensor in tensors):
            return "The parameters are sharded by a library that keeps them elsewhere: they cannot be rewound."
        for optimizer in self.optimizers:
            for thing in opaque_in(list(optimizer.state.values())):
                return f"The state of {type(optimizer).__name__} holds a {type(thing).__name__}: it cannot be rewound."
        return "" if tensors else "There are no parameters to rewind."

    def tensors(self) -> Iterator[Tensor]:
        """Every piece of memory of parameters, buffers, optimizer state and the rest, once. Not copies."""
        with plainly():
            survey = self.survey()
        yield from survey.inventory.tensors

    def all_finite(self) -> bool:
        """Whether parameters, buffers and optimizer state hold neither NaN nor Inf. Waits for the device.

        What is not trained may keep as many infinite entries as it was first seen with.
        """
        with plainly():
            return self.survey().inventory.is_finite()

    def capture(self) -> Captured:
        """A copy of everything."""
        with plainly():
            return self.survey().captured()

    def restore(self, captured: Captured, *, generators: bool = False) -> None:
        """Go back to `captured`, bit by bit, in place; generators and sources of data only where asked for.

        What the program has added since stays as it is: parameter groups, hyperparameters, modules. Raises DoesNotFit,
        with nothing changed, where parameters have been replaced by others of another shape or type, or another
        optimizer steps.
        """
        with plainly(), self._preserved_generators(captured.tensors):
            back = Return(captured.tensors)
            for part in (*captured.parts, *(captured.sources if generators else ())):
                part.put_back(back)
            back.finish()
        if generators:
            states.restore(captured.generators)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Without autograd, with normal tensors also where the program is in inference mode, and in one go: thousands of
    small objects are made, for which the garbage collector would go through the whole program several times.
    """
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.inference_mode(mode=False), torch.no_grad():
            yield
    finally:
        if is_collecting:
            gc.enable()


# ---- what belongs to a program ------------------------------------------------------------------------------------


def with_inner(optimizers: Sequence[Optimizer]) -> Iterator[Optimizer]:
    """The optimizers and those that they wrap, each once."""
    waiting, seen = list(optimizers), set[int]()
    while waiting:
        optimizer = waiting.pop(0)
        if id(optimizer) not in seen:
            seen.add(id(optimizer))
            yield optimizer
            waiting += [value for value in vars(optimizer).values() if issubclass(type(value), Optimizer)]


def _kind(cls: type) -> str:
    """What instances of a class may be here: "scheduler", "scaler", "average", or "" for nothing.

    Schedulers are torch's and those of libraries with a base class of their own, which is named so (timm).
    """
    if issubclass(cls, GradScaler):
        return "scaler"
    if issubclass(cls, AveragedModel):
        return "average"
    is_named = any(base.__name__ == "Scheduler" for base in cls.__mro__)
    is_stateful = hasattr(cls, "state_dict") and hasattr(cls, "load_state_dict")
    return "scheduler" if issubclass(cls, LRScheduler) or (is_named and is_stateful) else ""


def _averages(average: AveragedModel, model: nn.Module) -> bool:
    """Whether it averages the model, or one that the model wraps: it keeps no reference to it, only its shapes."""
    shapes = [parameter.shape for parameter in average.module.parameters()]
    return any([parameter.shape for parameter in module.parameters()] == shapes for module in model.modules())


@dataclass(frozen=True, eq=False)
class _Held:
    """What was given, in place of a weak reference."""

    thing: object

    def __call__(self) -> object:
        return self.thing


def _is_elsewhere(tensor: Tensor | None) -> bool:
    """Whether only a part of it is here, in a form that is not torch's: ZeRO-3, sharded tensors of old."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_sharding_spec")


def _is_source(thing: object) -> bool:
    return hasattr(type(thing), "__iter__") or hasattr(type(thing), "__getitem__")


# ---- generators ---------------------------------------------------------------------------------------------------


def _generators(tensors: Iterable[Tensor]) -> states.Generators:
    return states.note(dict.fromkeys(tensor.device for tensor in tensors))
