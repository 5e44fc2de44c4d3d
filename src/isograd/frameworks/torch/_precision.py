"""Hold weights and compute in float32, whatever the program asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isograd import _changes
from isograd.frameworks.torch._effects import parameters_of
from isograd.frameworks.torch._surgery import ModelEffect, Site

_NARROW = (torch.float16, torch.bfloat16)


class PrecisionRaise(ModelEffect):
    """`RaisePrecision`: half and bfloat16 weights, buffers and inputs become float32, and so does what comes out;
    autocast is off inside the model. Parameters keep their identity: the optimizer trains the same objects.
    """

    def __init__(self, change: _changes.RaisePrecision, site: Site) -> None:
        del change
        self._site = site
        self._contexts: list[Any] = []
        self._before = [(t, t.dtype) for t in (*site.root.parameters(), *site.root.buffers()) if t.dtype in _NARROW]
        for tensor, _ in self._before:
            tensor.data = tensor.data.float()
            tensor.grad = None if tensor.grad is None else tensor.grad.float()
        for parameter in parameters_of(site.optimizer):
            for name, held in site.optimizer.state.get(parameter, {}).items():
                if isinstance(held, Tensor) and held.dtype in _NARROW:
                    site.optimizer.state[parameter][name] = held.float()
        site.passage.entering.append(self._enter)
        site.passage.afterwards.append(self._leave)
        self.detail = f"{len(self._before)} tensors, autocast off inside the model"

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

    def undo(self) -> str | None:
        self._site.passage.entering.remove(self._enter)
        self._site.passage.afterwards.remove(self._leave)
        for tensor, dtype in self._before:
            tensor.data = tensor.data.to(dtype)
            tensor.grad = None if tensor.grad is None else tensor.grad.to(dtype)
        return "the weights have been rounded back" if self._before else None


def _widened(value: Any) -> Any:
    """Narrow floating-point tensors as float32, also within tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _NARROW else value
    if type(value) in (tuple, list):
        return type(value)(map(_widened, value))
    if type(value) is dict:
        return {key: _widened(one) for key, one in value.items()}
    return value
