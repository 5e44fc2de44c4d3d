"""Where isograd listens to PyTorch: the process-wide functions that every training loop goes through.

Each is replaced while at least one listener is subscribed and put back afterwards. A replacement calls the original
with the same arguments and returns what it returned; it never computes anything itself. Nothing here is a module hook,
so nothing here is seen by `torch.compile`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Listener(Protocol):
    """What a subscriber is told. None of these may raise."""

    def made_optimizer(self, optimizer: Optimizer) -> None: ...
    def before_backward(self, tensors: Sequence[Tensor], inputs: Sequence[Tensor] | None) -> None: ...
    def after_backward(self) -> None: ...
    def before_step(self, optimizer: Optimizer, closure: bool) -> None: ...
    def after_step(self, optimizer: Optimizer) -> None: ...
    def clipped(self, norm: Tensor, limit: float) -> None: ...
    def before_scaled_step(self, scaler: Any) -> None: ...
    def after_scaled_step(self, optimizer: Optimizer, stepped: bool) -> None: ...
    def packs_saved_tensors(self) -> None: ...


_listeners: list[Listener] = []
_undo: list[Callable[[], None]] = []
_is_stepping = False


def subscribe(listener: Listener, *, first: bool = False) -> None:
    """Tell `listener` from now on, after the others or before them; the first subscriber installs the taps."""
    _listeners.insert(0 if first else len(_listeners), listener)
    if not _undo:
        _install()


def unsubscribe(listener: Listener) -> None:
    """Stop telling `listener`; the last one to leave restores PyTorch. Unknown listeners are ignored."""
    if listener in _listeners:
        _listeners.remove(listener)
    _restore_if_unused()


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Within it nobody hears anything but who subscribes inside: a rehearsal is no part of a run that is watched."""
    others = _listeners[:]
    # Somebody has to listen, or the taps that the others rely on would be taken out meanwhile.
    _listeners[:] = [_StepWatch(None)] if others else []
    try:
        yield
    finally:
        _listeners[:] = others
        _restore_if_unused()


def _restore_if_unused() -> None:
    # Torch is iterating over its step hooks while it calls them: then the next backward pass restores instead.
    if not _listeners and not _is_stepping:
        while _undo:
            _undo.pop()()


def _install() -> None:
    pre = register_optimizer_step_pre_hook(_before_step)
    post = register_optimizer_step_post_hook(_after_step)
    _undo.extend((pre.remove, post.remove))
    _replace(torch.autograd, "backward", _tap_backward)
    _replace(torch.autograd, "grad", _tap_grad)
    _replace(clip_grad, "_clip_grads_with_norm_", _tap_clip)
    _replace(torch.amp.GradScaler, "step", _tap_scaler)
    _replace(Optimizer, "__init__", _tap_optimizer)
    _replace(torch.autograd.graph.saved_tensors_hooks, "__enter__", _tap_saved_tensors)


def _replace(owner: Any, name: str, tap: Callable[[Any], Any]) -> None:
    _undo.append(replace(owner, name, tap))


def replace(owner: Any, name: str, tap: Callable[[Any], Any]) -> Callable[[], None]:
    """Put `tap(original)` in the place of what `owner` has under `name`; called, the answer puts the original back.

    Someone who wrapped the replacement meanwhile keeps it: a tap that nobody listens to calls the original.
    """
    original = getattr(owner, name)
    replacement = functools.wraps(original)(tap(original))
    setattr(owner, name, replacement)

    def restore() -> None:
        if getattr(owner, name) is replacement:
            setattr(owner, name, original)

    return restore


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None) is not None  # args[0] is the optimizer
    _tell_of_step(lambda listener: listener.before_step(optimizer, closure))


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _tell_of_step(lambda listener: listener.after_step(optimizer))


def _tell_of_step(tell: Callable[[Listener], None]) -> None:
    global _is_stepping
    outer, _is_stepping = _is_stepping, True
    try:
        for listener in tuple(_listeners):
            tell(listener)
    finally:
        _is_stepping = outer


def _tap_backward(original: Callable[..., None]) -> Callable[..., None]:
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        _restore_if_unused()
        listeners, tensors = tuple(_listeners), _kept(tensors)
        if kwargs.get("inputs") is not None:
            kwargs["inputs"] = _kept(kwargs["inputs"])
        for listener in listeners:
            listener.before_backward(_tensors(tensors), _tensors(kwargs.get("inputs")) or None)
        try:
            original(tensors, *args, **kwargs)
        finally:
            for listener in listeners:
                listener.after_backward()

    return backward


def _tap_grad(original: Callable[..., Any]) -> Callable[..., Any]:
    def grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        listeners, outputs, inputs = tuple(_listeners), _kept(outputs), _kept(inputs)
        for listener in listeners:
            listener.before_backward(_tensors(outputs), _tensors(inputs))
        try:
            return original(outputs, inputs, *args, **kwargs)
        finally:
            for listener in listeners:
                listener.after_backward()

    return grad


def _kept(values: Any) -> Any:
    """`values`, or its items where it can be iterated over only once."""
    return tuple(values) if isinstance(values, Iterator) else values


def _tensors(values: Any) -> tuple[Tensor, ...]:
    """The tensors among one value or several: torch also takes edges of the graph."""
    if isinstance(values, Tensor):
        return (values,)
    return tuple(value for value in values or () if isinstance(value, Tensor))


def _tap_clip(original: Callable[..., None]) -> Callable[..., None]:
    def clip_grads_with_norm(parameters: Any, max_norm: float, total_norm: Tensor, *args: Any, **kwargs: Any) -> None:
        for listener in tuple(_listeners):
            listener.clipped(total_norm, max_norm)
        original(parameters, max_norm, total_norm, *args, **kwargs)

    return clip_grads_with_norm


def _tap_scaler(original: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        for listener in tuple(_listeners):
            listener.before_scaled_step(self)
        steps = _StepWatch(optimizer)
        _listeners.append(steps)
        try:
            return original(self, optimizer, *args, **kwargs)
        finally:
            _listeners.remove(steps)
            for listener in tuple(_listeners):
                listener.after_scaled_step(optimizer, steps.stepped)

    return step


def _tap_optimizer(original: Callable[..., None]) -> Callable[..., None]:
    def initialize(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for listener in tuple(_listeners):
            listener.made_optimizer(self)

    return initialize


def _tap_saved_tensors(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def enter(self: Any) -> Any:
        for listener in tuple(_listeners):
            listener.packs_saved_tensors()
        return original(self)

    return enter


class _StepWatch:
    """Hears only whether one optimizer stepped: `GradScaler.step` leaves it out after an overflow."""

    def __init__(self, optimizer: Optimizer | None) -> None:
        self.optimizer, self.stepped = optimizer, False

    def before_step(self, optimizer: Optimizer, closure: bool) -> None:
        self.stepped |= optimizer is self.optimizer

    def _ignore(self, *_: Any) -> None:
        return None

    made_optimizer = before_backward = after_backward = after_step = clipped = _ignore
    before_scaled_step = after_scaled_step = packs_saved_tensors = _ignore
