"""One step's readings on their way from the device to the host, without making the host wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Row:
    """Zero-dimensional tensors gathered during a step, read back together.

    `put` remembers tensors and returns where they will stand; after the row was read, indexing gives floats.
    On CPU reading is a copy; on an accelerator it is an asynchronous copy into pinned memory behind an event.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._values: list[float] = []
        self._copies: list[tuple[list[int], Tensor, Any]] = []

    def put(self, tensors: Iterable[Tensor]) -> range:
        """Where `tensors` will stand in the row."""
        start = len(self._tensors)
        self._tensors.extend(tensors)
        return range(start, len(self._tensors))

    def __getitem__(self, places: range) -> list[float]:
        return self._values[places.start : places.stop]

    def send(self) -> None:
        """Start the copy to the host and let go of the device tensors."""
        by_device: dict[torch.device, list[int]] = {}
        for place, tensor in enumerate(self._tensors):
            by_device.setdefault(tensor.device, []).append(place)
        for device, places in by_device.items():
            packed = torch.stack([self._tensors[place].detach().float().reshape(()) for place in places])
            self._copies.append((places, *_to_host(packed, device)))
        self._values = [0.0] * len(self._tensors)
        self._tensors = []

    def is_ready(self) -> bool:
        """Whether `receive` would not wait."""
        return all(event is None or bool(event.query()) for _, _, event in self._copies)

    def receive(self) -> None:
        """Wait for the copy, if it is still under way, and make the floats available."""
        for places, packed, event in self._copies:
            if event is not None:
                event.synchronize()
            for place, value in zip(places, packed.tolist(), strict=True):
                self._values[place] = value
        self._copies = []


def _to_host(packed: Tensor, device: torch.device) -> tuple[Tensor, Any]:
    if device.type != "cuda":
        return packed.cpu(), None
    pinned = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True, device="cpu")
    pinned.copy_(packed, non_blocking=True)
    cuda: Any = torch.cuda  # its events carry no types
    event = cuda.Event()
    event.record(cuda.current_stream(device))
    return pinned, event


class Queue:
    """Rows in the order of their steps, each with what to do once it has arrived.

    `lag`: None reads whatever is ready (single process). A number reads exactly the rows older than that many steps,
    waiting if need be: the same rows at the same moment on every rank.
    """

    def __init__(self, lag: int | None = None) -> None:
        self.lag = lag
        self._waiting: deque[tuple[Row, Callable[[Row], None]]] = deque()

    def push(self, row: Row, then: Callable[[Row], None]) -> None:
        """Send `row` and call `then(row)` when it has arrived, at this or a later `drain`."""
        row.send()
        self._waiting.append((row, then))

    def drain(self, *, everything: bool = False) -> None:
        """Handle the rows that have arrived, oldest first; with `everything`, wait for all."""
        while self._waiting and (everything or self._is_next_due()):
            row, then = self._waiting.popleft()
            row.receive()
            then(row)

    def _is_next_due(self) -> bool:
        if self.lag is not None:
            return len(self._waiting) > self.lag
        return self._waiting[0][0].is_ready()
