"""Where the operation that is under way was called: its module, the line of the user's source, and in which pass.

In the forward pass the interpreter's frames tell. In the backward pass the node of the autograd graph tells, which
keeps the line that made it (`_source.py`) and, while sites are kept, the module. Where the engine runs Python code of
the user's (a function's own derivative, a hook, a checkpointed block) frames tell again.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.fx import traceback as fx_traceback
from torch.utils import checkpoint

from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch import _source as source
from isograd.frameworks.torch._trace import operation_name

_CALL = nn.Module._call_impl.__code__
_ENGINE = "_engine_run_backward"
_MODULE = "isograd.module "
"""What an entry of a node's stack begins with that holds the path of the module that made it."""

_NAMES = {
    "LinalgVectorNorm": "vector_norm", "NativeLayerNorm": "layer_norm", "NativeBatchNorm": "batch_norm",
    "NllLoss": "nll_loss", "MseLoss": "mse_loss", "ToCopy": "conversion", "LogSoftmax": "log_softmax",
    "EuclideanDist": "cdist", "SmoothL1Loss": "smooth_l1_loss", "BinaryCrossEntropy": "binary_cross_entropy",
    "BinaryCrossEntropyWithLogits": "binary_cross_entropy_with_logits", "NativeGroupNorm": "group_norm",
}  # fmt: skip
"""What users know the operation of a node as, where it is not the node's name in small letters."""


class CallSites:
    """`roots`: the models by the prefix of their names; a module of none of them is called by its type."""

    def __init__(self, roots: Mapping[str, nn.Module]) -> None:
        self._paths: dict[int, str] = {}
        self._lines = source.SourceLines()
        for prefix, root in roots.items():
            for path, module in describe.walk(root, prefix):
                self._paths.setdefault(id(module), path)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Within it, nodes that are made keep line and module."""
        self._lines.keep(True)
        before = fx_traceback.format_stack

        def kept_stack() -> list[str]:
            path = self._module_of(sys._getframe(1))
            return [*([] if path is None else [_MODULE + path]), *before()]

        fx_traceback.format_stack = kept_stack
        try:
            yield
        finally:
            if fx_traceback.format_stack is kept_stack:
                fx_traceback.format_stack = before
            self._lines.pause()

    def here(self) -> dict[str, Any]:
        """Direction, `derivative_of`, module and line, by the names that a `BadOperation` has for them."""
        node: Any = torch._C._current_autograd_node()  # None in the forward pass
        frame = sys._getframe(1)
        inner, recomputed = (frame, False) if node is None else _users_code(frame)
        if inner is not None:
            entry, module = "".join(source._users_entry(inner)), self._module_of(inner)
        else:
            entry, module = source._entry(node) or "", _module_kept(node)
        line, is_backward = source._line(entry), node is not None and not recomputed
        return {
            "direction": "backward" if is_backward else "forward",
            "derivative_of": _name_of(node) if is_backward else "",
            "module": module or "",
            **({} if line is None else vars(line)),
        }

    def _module_of(self, frame: FrameType | None) -> str | None:
        """The path of the innermost module whose call is under way, None outside of all."""
        while frame is not None:
            if frame.f_code is _CALL:
                module = frame.f_locals["self"]
                return self._paths.get(id(module)) or type(module).__name__
            frame = frame.f_back
        return None


def _users_code(frame: FrameType | None) -> tuple[FrameType | None, bool]:
    """(the innermost frame where the engine runs Python code of the user's, whether that is a forward pass again)."""
    innermost, is_users, recomputes = frame, False, False
    while frame is not None and frame.f_code.co_name != _ENGINE:
        is_users |= source.is_users(frame.f_code.co_filename)
        recomputes |= frame.f_code.co_filename == checkpoint.__file__
        frame = frame.f_back
    return innermost if is_users else None, recomputes


def _module_kept(node: Any) -> str | None:
    entries = node.metadata.get(source._STACK) or ()
    return next((entry.removeprefix(_MODULE) for entry in entries if entry.startswith(_MODULE)), None)


def _name_of(node: Any) -> str:
    name = operation_name(node)
    return _NAMES.get(name, name.lower())
