"""A forward pre-hook on root modules that tells how they are called, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from isograd.frameworks import Shield
from isograd.frameworks.torch._calls import _is_transformed

Hear = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]


class CallHook:
    """Tells `hear(name, module, args, kwargs)` of each call, inside `shield`; changes no argument.

    As the output hooks of `_calls.py` it never stays in a copy: deep-copied or pickled it becomes a bound method of the
    standard library that ignores its arguments and returns None.
    """

    def __init__(self, shield: Shield, hear: Hear, name: str) -> None:
        self._shield, self._hear, self._name = shield, hear, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or _is_transformed():
            return
        self._shield.call(self._hear, self._name, module, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


def is_plain(module: nn.Module) -> bool:
    """Whether calls of a module run in Python, where a hook can be put: it is neither scripted nor compiled."""
    if isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule":
        return False
    return getattr(module, "_compiled_call_impl", None) is None
