"""Hold weights and compute in float32, whatever the program asked for."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from isograd import _changes
from isograd.frameworks.torch._surgery import ModelEffect, Site

_NARROW = (torch.float16, torch.bfloat16)


class PrecisionRaise(ModelEffect):
    """`RaisePrecision`: half and bfloat16 weights, buffers and inputs become float32, and so does what comes out;
    autocast is off inside the model. Parameters keep their identity: the optimizer trains the same objects.
    """

    def __init__(self, change: _changes.RaisePrecision, site: Site, back: ExitStack) -> None:
        del change
        self._site = site
        self._contexts: list[Any] = []
        narrow = [(t, t.dtype) for t in (*site.root.parameters(), *site.root.buffers()) if t.dtype in _NARROW]
        for tensor, dtype in narrow:
            back.callback(_hold_in, dtype, tensor, site.optimizer)
            _hold_in(torch.float32, tensor, site.optimizer)
        site.passage.entering.append(self._enter)
        back.callback(site.passage.entering.remove, self._enter)
        site.passage.afterwards.append(self._leave)
        back.callback(site.passage.afterwards.remove, self._leave)
        self.left = "The weights have been rounded back to the program's own precision." if narrow else None
        self.detail = f"{len(narrow)} tensors, autocast off inside the model"

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        devices = {parameter.device.type for parameter in self._site.root.parameters()}
        for device in sorted(devices - {"meta"}):
            context: Any = torch.autocast(device, enabled=False)
            context.__enter__()
            self._contexts.append(context)
        return _widened(args), _widened(kwargs)

    def _leave(self) -> None:
        while self._contexts:
            self._contexts.pop().__exit__(None, None, None)


def _hold_in(dtype: torch.dtype, tensor: Tensor, optimizer: Optimizer) -> None:
    """Give a tensor, its gradient, and what its optimizer keeps of it in the same precision, another one."""
    before = tensor.dtype
    tensor.data = tensor.data.to(dtype)
    tensor.grad = None if tensor.grad is None else tensor.grad.to(dtype)
    state = optimizer.state.get(tensor, {})
    for name, held in state.items():
        if isinstance(held, Tensor) and held.dtype == before and name != "step":  # the counter is always in float32
            state[name] = held.to(dtype)


def _widened(value: Any) -> Any:
    """Narrow floating-point tensors as float32, also within tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _NARROW else value
    if type(value) in (tuple, list):
        return type(value)(map(_widened, value))
    if type(value) is dict:
        return {key: _widened(one) for key, one in value.items()}
    return value
