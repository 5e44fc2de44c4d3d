"""Buffers as they were before the forward pass of the step under way: running statistics, codebooks, counters."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

SMALL = 1 << 16
"""Entries up to which a buffer is copied at every step. Batch normalization writes its running statistics without
counting it as a write; what is larger than any of those is copied where torch has counted one."""


class Buffers:
    """Copies of the buffers of models, renewed after each good step.

    What changes a buffer between a step's end and the next forward pass is undone with the step when that is left out.
    """

    def __init__(self) -> None:
        self._kept: MutableMapping[Tensor, tuple[int, Tensor]] = WeakTensorKeyDictionary()

    def keep(self, model: nn.Module) -> None:
        """Copy what may have changed since the last time."""
        written: list[Tensor] = []
        copies: list[Tensor] = []
        for buffer in model.buffers():
            version, copy = self._kept.get(buffer, (-1, None))
            if copy is None or not _fits(copy, buffer):
                self._kept[buffer] = buffer._version, buffer.detach().clone()
            elif buffer.numel() <= SMALL or version != buffer._version:
                self._kept[buffer] = buffer._version, copy
                written.append(buffer.detach())
                copies.append(copy)
        if copies:
            torch._foreach_copy_(copies, written)

    def choose(self, model: nn.Module, left_out: Tensor) -> None:
        """Put back what was kept where `left_out` [] is 1, keep what there is where it is 0: without waiting for it."""
        for buffer in model.buffers():
            version, copy = self._kept.get(buffer, (-1, None))
            if copy is None or not _fits(copy, buffer):
                self._kept[buffer] = buffer._version, buffer.detach().clone()
            elif buffer.numel() <= SMALL or version != buffer._version:
                copy.copy_(torch.where(left_out.to(buffer.device) > 0, copy, buffer.detach()))
                buffer.detach().copy_(copy)
                self._kept[buffer] = buffer._version, copy

    def put_back(self, model: nn.Module) -> None:
        """Let every buffer be as it was kept: also one that was written to behind autograd's back."""
        for buffer in model.buffers():
            if buffer in self._kept:
                copy = self._kept[buffer][1]
                if _fits(copy, buffer):
                    buffer.detach().copy_(copy)
                    self._kept[buffer] = buffer._version, copy

    def values(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The kept values by the buffers' names."""
        return {name: self._kept[buffer][1] for name, buffer in model.named_buffers() if buffer in self._kept}

    @property
    def num_bytes(self) -> int:
        """What the copies take."""
        return sum(copy.numel() * copy.element_size() for _, copy in self._kept.values())


def _fits(copy: Tensor, buffer: Tensor) -> bool:
    return copy.shape == buffer.shape and copy.dtype == buffer.dtype and copy.device == buffer.device
