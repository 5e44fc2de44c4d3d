"""Copies of the tensors in nested values, and putting them back where they came from: same objects, same addresses.

Every piece of memory is copied once, however many tensors share it.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isograd.frameworks.torch import _kernels as kernels
from isograd.frameworks.torch._pieces import Maker, address, consists, maker, pieces


class DoesNotFit(Exception):
    """What was copied has no place in the program any more: it has been rebuilt since."""


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """Where the pieces of one tensor stand among the copies, and what the tensor was."""

    pieces: tuple[int, ...]
    cls: type[Tensor] | None  # of a tensor that consists of others
    layout: torch.layout
    shape: torch.Size
    remake: Maker


class Inventory:
    """The tensors of a program, to be copied or looked at: each piece of memory once, in the order of meeting.

    `infinite` holds for each how many of its entries may be infinite, None where nobody looks.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.infinite: list[int | None] = []
        self._places: dict[int, Place] = {}
        self._indices: dict[tuple[Any, ...], int] = {}
        self._met: list[Tensor] = []  # kept alive: identities and addresses are not given to others meanwhile

    @property
    def num_bytes(self) -> int:
        """Memory of copies of everything here."""
        return sum(map(num_bytes, self.tensors))

    def plan(self, value: Any, infinite: int | None = 0) -> Any:
        """`value` with a `Place` for every tensor; containers are new ones, all else is the same object."""
        if isinstance(value, Tensor):
            return self.place(value, infinite)
        return _mapped(value, partial(self.plan, infinite=infinite))

    def place(self, tensor: Tensor, infinite: int | None = 0) -> Place:
        """Take in one tensor, if it is not there yet."""
        place = self._places.get(id(tensor))
        if place is None:
            self._met.append(tensor)
            indices = tuple([self._add(piece, infinite) for piece in pieces(tensor)])
            cls = type(tensor) if consists(tensor) else None
            place = self._places[id(tensor)] = Place(indices, cls, tensor.layout, tensor.shape, maker(tensor))
        return place

    def _add(self, piece: Tensor, infinite: int | None) -> int:
        index = self._indices.setdefault(address(piece), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(piece)
            self.infinite.append(infinite)
        return index

    def is_finite(self) -> bool:
        """Whether no tensor holds NaN, nor more infinite entries than it may. Reads one row from each device."""
        pairs = [
            (tensor, infinite)
            for tensor, infinite in zip(self.tensors, self.infinite, strict=True)
            if infinite is not None and tensor.numel() and (tensor.is_floating_point() or tensor.is_complex())
        ]
        # A norm is finite where every entry is; it may overflow, or the entries be allowed: those are looked at again.
        norms = _read(kernels.norms([kernels.real(tensor) for tensor, _ in pairs]))
        return all(
            math.isfinite(norm) or _is_fine(kernels.real(tensor), infinite)
            for (tensor, infinite), norm in zip(pairs, norms, strict=True)
        )


def _read(scalars: Sequence[Tensor]) -> list[float]:
    """Zero-dimensional tensors as numbers, one transfer for each device."""
    places: defaultdict[torch.device, list[int]] = defaultdict(list)
    for place, scalar in enumerate(scalars):
        places[scalar.device].append(place)
    numbers = [0.0] * len(scalars)
    for there in places.values():
        for place, number in zip(there, torch.stack([scalars[place] for place in there]).tolist(), strict=True):
            numbers[place] = number
    return numbers


def _is_fine(values: Tensor, infinite: int) -> bool:
    return not bool(values.isnan().any()) and int(values.isinf().sum()) <= infinite


def num_infinite(tensor: Tensor) -> int:
    """How many entries are +Inf or -Inf. Waits for the device."""
    values = kernels.real(tensor)
    return 0 if math.isfinite(kernels.norms([values])[0]) else int(values.isinf().sum())


def num_bytes(tensor: Tensor) -> int:
    """The memory of a dense copy."""
    return tensor.numel() * tensor.element_size()


# ---- nested values ------------------------------------------------------------------------------------------------


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A container with every entry changed, and a copy of an array; all else as it is."""
    if type(value) is tuple:
        return tuple(map(change, value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(change, value))
    if type(value) in (dict, OrderedDict, defaultdict):
        changed = copy.copy(value)
        changed.update({key: change(entry) for key, entry in value.items()})
        return changed
    if type(value) in (list, deque):
        changed = copy.copy(value)
        for index, entry in enumerate(value):
            changed[index] = change(entry)
        return changed
    return copy.copy(value) if type(value) in (set, bytearray, np.ndarray) else value


_PLAIN = (Tensor, np.ndarray, np.generic, bool, int, float, complex, str, bytes, bytearray, type(None))


def opaque_in(value: Any) -> Iterator[Any]:
    """What nested containers hold besides tensors, arrays and plain values: nobody knows how to copy it."""
    if type(value) in (dict, OrderedDict, defaultdict):
        value = list(value.values())
    if type(value) in (list, tuple, set, deque) or hasattr(value, "_fields"):
        for entry in value:
            yield from opaque_in(entry)
    elif not isinstance(value, (*_PLAIN, torch.dtype, torch.device)):
        yield value


# ---- copying, and back --------------------------------------------------------------------------------------------


def copies(tensors: Sequence[Tensor], into: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Copies on the same devices, which are not waited for; in the memory of `into`, which is alike."""
    held = [torch.empty_like(tensor) for tensor in tensors] if into is None else list(into)
    _write(list(zip(held, tensors, strict=True)))
    return held


def are_alike(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether the one can be copied into the other without a bit changed."""
    return len(tensors) == len(others) and all(
        one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        for one, other in zip(tensors, others, strict=True)
    )


def _write(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy every second tensor into the first; on accelerators, few launches for all."""
    groups: defaultdict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for target, source in pairs:
        groups[target.device, target.dtype].append((target, source))
    for group in groups.values():
        torch._foreach_copy_([target for target, _ in group], [source for _, source in group])


class Return:
    """A way back, first prepared and then gone: until `finish` nothing has changed.

    A tensor is written into where the program still has it, and made anew where it has not.
    """

    def __init__(self, held: Sequence[Tensor]) -> None:
        self._held = held
        self._writes: dict[tuple[Any, ...], tuple[Tensor, int]] = {}
        self._made: dict[int, Tensor] = {}
        self._afterwards: list[Callable[[], Any]] = []

    def then(self, action: Callable[[], Any]) -> None:
        """Do this at the end, after the tensors have been written."""
        self._afterwards.append(action)

    def put(self, now: Any, then: Any) -> Any:
        """What is to stand where `now` stands: `now` itself, to be written into, or something new."""
        if isinstance(then, Place):
            return now if self.put_into(now, then) else self._remade(then)
        return _mapped(then, partial(self.put, None))

    def put_into(self, now: Any, place: Place) -> bool:
        """Whether the tensor `now` can be written into: then it is going to be."""
        if not isinstance(now, Tensor) or not self._is_same(now, place):
            return False
        both = zip(pieces(now), place.pieces, strict=True)
        # `.data` has a version of its own. A graph that the program keeps would refuse its backward pass otherwise.
        found = {address(piece): (piece.data, index) for piece, index in both if piece.numel()}
        # Two tensors that have come to share their memory since are two again: only one of them can have it.
        if any(self._writes.get(where, write)[1] != write[1] for where, write in found.items()):
            return False
        self._writes.update(found)
        return True

    def _is_same(self, now: Tensor, place: Place) -> bool:
        cls = type(now) if consists(now) else None
        is_same = (cls, now.layout, now.shape) == (place.cls, place.layout, place.shape)
        return is_same and are_alike(pieces(now), [self._held[index] for index in place.pieces])

    def _remade(self, place: Place) -> Tensor:
        if id(place) not in self._made:
            self._made[id(place)] = place.remake([self._held[index].clone() for index in place.pieces])
        return self._made[id(place)]

    def finish(self) -> None:
        """Go back."""
        _write([(piece, self._held[index]) for piece, index in self._writes.values()])
        for action in self._afterwards:
            action()
