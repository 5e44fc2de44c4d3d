"""Snapshots of a training program in memory: the last few that were sound, within a limit, and going back to them."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isograd.frameworks.torch._free_memory import free_bytes
from isograd.frameworks.torch._tensor_copies import DoesNotFit, are_alike, num_bytes
from isograd.frameworks.torch._training_state import Captured, Survey, TrainingState, plainly

SHARE = 4
"""By default snapshots take at most one part in so many of what is free: the program has the rest for its largest
step, which may be yet to come.
"""

Sizes = Counter[torch.device]
"""Bytes by device."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Snapshot:
    step: int
    captured: Captured
    sizes: Sizes


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prepared:
    """What stands ready to be copied: how many snapshots may be held with it, and new memory where there is room."""

    survey: Survey
    sizes: Sizes
    room: int
    fresh: list[Tensor] | None


class Snapshots:
    """The last `keep` snapshots of `program`, on the devices of its tensors; fewer where `memory` is too little.

    `memory` is the limit in bytes for all of them together. None: a quarter of what is free on each device, measured
    at the first snapshot, when the steps before it have shown what training needs.

    `smallest` is asked once for each snapshot how many are to be held with it, 0 for none. Where several processes
    train together it returns the smallest number among them, and they keep and refuse alike.
    """

    def __init__(
        self,
        program: TrainingState,
        *,
        keep: int = 3,
        memory: int | None = None,
        smallest: Callable[[int], int] = int,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is how many snapshots are held, at least 1, not {keep}.")
        self._program, self._keep, self._memory, self._smallest = program, keep, memory, smallest
        self._limits: Sizes | None = None
        self._held: deque[_Snapshot] = deque()
        self._problem = ""
        self.found_damage = False  # whether the last one was refused because the state was not finite
        self._host_seconds = 0.0
        self._marks: tuple[Any, Any] | None = None

    # ---- what there is and what it takes --------------------------------------------------------------------------

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of those that are held, oldest first."""
        return tuple(snapshot.step for snapshot in self._held)

    @property
    def bytes_each(self) -> int:
        """What one takes if it is taken now. Optimizers make their state at their first step: known after it."""
        return self._sizes_now().total()

    @property
    def bytes_held(self) -> int:
        """What those that are held take together."""
        return sum(snapshot.sizes.total() for snapshot in self._held)

    @property
    def limit(self) -> int:
        """The bytes that all of them together may take."""
        return self._memory if self._memory is not None else self._limits_of(self._sizes_now()).total()

    @property
    def refusal(self) -> str:
        """One sentence why none can be taken; "" where nothing stands against it."""
        try:
            return self._problem or self._program.objection() or self._shortage()
        except Exception as error:
            return _sentence(error)

    @property
    def seconds(self) -> float:
        """How long the last one took; the copying on an accelerator counts once it has ended."""
        if self._marks is None or not self._marks[1].query():
            return self._host_seconds
        return self._host_seconds + float(self._marks[0].elapsed_time(self._marks[1])) / 1e3

    # ---- taking ---------------------------------------------------------------------------------------------------

    def take(self, step: int) -> bool:
        """Copy the state, as that of `step`; where no more may be held, the oldest makes room. False where it is not
        finite, or there is a `refusal`: all older ones stay. Waits for the device once, before it copies.
        """
        began = time.perf_counter()
        with plainly():
            prepared = self._prepared()
            room = self._smallest(prepared.room if prepared is not None else 0)
            is_taken = prepared is not None and room > 0
            if prepared is not None and is_taken:
                self._copy(step, prepared, room)
        self._host_seconds = time.perf_counter() - began
        return is_taken

    def _prepared(self) -> _Prepared | None:
        """None where no snapshot is to be taken."""
        if self._problem or _is_capturing():
            return None
        try:
            survey = self._program.survey()
            sizes = _sizes(survey.inventory.tensors)
            self._limits = self._limits_of(sizes)
            room = self._room(sizes)
            self._problem = self._program.objection()
            if self._problem or not room:
                return None
            self.found_damage = not survey.inventory.is_finite()
            if self.found_damage:
                return None
            fresh = [torch.empty_like(t) for t in survey.inventory.tensors] if len(self._held) < room else None
            return _Prepared(survey=survey, sizes=sizes, room=room, fresh=fresh)
        except Exception as error:  # whatever a program's own classes do, it goes on without snapshots
            self._problem = _sentence(error)
            return None

    def _copy(self, step: int, prepared: _Prepared, room: int) -> None:
        memory = prepared.fresh
        while len(self._held) >= room:
            oldest = self._held.popleft().captured.tensors
            if memory is None and are_alike(prepared.survey.inventory.tensors, oldest):
                memory = oldest
            del oldest  # what cannot be used is free before new memory is asked for
        began = _mark()
        self._held.append(_Snapshot(step=step, captured=prepared.survey.captured(memory), sizes=prepared.sizes))
        ended = _mark()
        self._marks = None if began is None else (began, ended)

    # ---- memory ---------------------------------------------------------------------------------------------------

    def _limits_of(self, sizes: Sizes) -> Sizes:
        """The bytes allowed on each device; those measured at the first snapshot stay."""
        return self._limits or Counter({device: free_bytes(device) // SHARE for device in sizes})

    def _room(self, sizes: Sizes) -> int:
        """How many may be held: one of this size, and the newest of the others."""
        limits, total, room = self._limits_of(sizes), Sizes(), 0
        for one in (sizes, *(older.sizes for older in reversed(self._held))):
            total += one
            if room == self._keep or not self._is_within(total, limits):
                break
            room += 1
        return room

    def _is_within(self, total: Sizes, limits: Sizes) -> bool:
        if self._memory is not None:
            return total.total() <= self._memory
        return all(total[device] <= limits[device] for device in total)

    def _shortage(self) -> str:
        sizes = self._sizes_now()
        if self._room(sizes):
            return ""
        one, limit = _amount(sizes.total()), _amount(self.limit)
        return (
            f"A snapshot takes {one}, and all of them together may take {limit}: allow more, or do without rewinding."
        )

    def _sizes_now(self) -> Sizes:
        return _sizes(self._program.tensors())

    # ---- going back -----------------------------------------------------------------------------------------------

    def go_back(self, before: int) -> int | None:
        """Make the program's state that of the newest snapshot taken at a step <= `before`, and drop those after it.
        Returns its step; None where there is none, or none that still fits the program. Generators stay where they are.

        Raises whatever a `load_state_dict` of the program's own raises; then everything else has been put back.
        """
        while self._held and self._held[-1].step > before:
            self._held.pop()
        while self._held and not self._restore(self._held[-1].captured):
            self._held.pop()
        return self._held[-1].step if self._held else None

    def _restore(self, captured: Captured) -> bool:
        try:
            self._program.restore(captured)
        except DoesNotFit:
            return False
        return True


def _sizes(tensors: Iterable[Tensor]) -> Sizes:
    sizes = Sizes()
    for tensor in tensors:
        sizes[tensor.device] += num_bytes(tensor)
    return sizes


def _amount(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def _sentence(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"No snapshot can be taken: {type(error).__name__}{': ' * bool(line)}{line}."


def _is_capturing() -> bool:
    """Whether a CUDA graph is being recorded: then nothing can be read."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _mark() -> Any:
    """A place in the queue of a CUDA device, with its time; None elsewhere."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
