"""Changes that act at every backward pass and optimizer step: gradients, hyperparameters, updates, weights.

One instance serves every optimizer of the program; what each needs between calls is kept by optimizer, weakly.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, RMSprop

from isograd import _changes
from isograd._changes import CannotApply
from isograd.frameworks.torch import _clipping as clipping
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch._effects import (
    StepEffect,
    gradients_of,
    largest_entry,
    parameters_of,
    with_gradients,
)
from isograd.frameworks.torch._multipliers import Multiplier, multiplier_of

Group = dict[str, Any]
T = TypeVar("T")


class Succession(Generic[T]):
    """One thing for each optimizer, which those made later over the same parameters inherit: some loops make a new one
    every epoch.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._held: dict[int, tuple[weakref.ref[Tensor], T]] = {}

    def of(self, optimizer: Optimizer) -> T:
        """The optimizer's own, made where there is none."""
        parameters = parameters_of(optimizer)
        for parameter in parameters:
            ref, held = self._held.get(id(parameter), (None, None))
            if ref is not None and held is not None and ref() is parameter:
                return held
        made = self._make()
        self._held.update({id(parameter): (weakref.ref(parameter), made) for parameter in parameters})
        return made


# ---- gradients --------------------------------------------------------------------------------------------------


class Clipping(StepEffect):
    """`ClipGradients`: one of `_clipping.py`, behind a gate that lets only finite gradients reach it."""

    def __init__(self, change: _changes.ClipGradients) -> None:
        self._change = change
        self._clips = Succession(lambda: _make_clip(change))
        self._exempt: WeakKeyDictionary[Optimizer, set[int]] = WeakKeyDictionary()

    def adopt(self, optimizer: Optimizer, roots: Sequence[nn.Module]) -> str:
        """Brock et al. leave the output layer out of adaptive clipping; so do we."""
        if self._change.method != "adaptive":
            return ""
        outputs = [layer for root in roots if (layer := describe.output_layer(root)) is not None]
        self._exempt[optimizer] = {id(p) for layer in outputs for p in layer.parameters()}
        return "but for the output layer" if outputs else ""

    def change_gradients(self, optimizer: Optimizer) -> None:
        exempt = self._exempt.get(optimizer, set())
        parameters = [p for p in with_gradients(optimizer) if id(p) not in exempt]
        if parameters and math.isfinite(largest_entry([p.grad for p in parameters if p.grad is not None])):
            self._clips.of(optimizer)(parameters)


def _make_clip(change: _changes.ClipGradients) -> clipping.Clip:
    if change.method == "percentile":
        return partial(clipping.clip_by_history, history=clipping.PercentileClip(change.limit))
    if change.method == "z-score":
        return partial(clipping.clip_by_history, history=clipping.ZScoreClip(change.limit))
    plain: Mapping[str, Callable[..., Any]] = {
        "value": clipping.clip_value,
        "norm": clipping.clip_norm,
        "tensor-norm": clipping.clip_tensor_norms,
        "adaptive": clipping.clip_adaptively,
    }
    return partial(plain[change.method], limit=change.limit)


class WeightPenalty(StepEffect):
    """`PenalizeWeights`: adds l1 sign(w) + l2 w to the gradients of weights with two axes or more. The loss that the
    program computes stays its own.
    """

    def __init__(self, change: _changes.PenalizeWeights) -> None:
        self._change = change

    def change_gradients(self, optimizer: Optimizer) -> None:
        for parameter in with_gradients(optimizer):
            gradient = parameter.grad
            if gradient is not None and parameter.dim() > 1 and gradient.layout == torch.strided:
                gradient.add_(parameter.detach().sign(), alpha=self._change.l1)
                gradient.add_(parameter.detach(), alpha=self._change.l2)


class Averaging(StepEffect):
    """`AverageAccumulation`: divides by the number of backward passes that added to an optimizer's gradients.

    Gradients that stand at zero when a pass begins have been cleared: counting begins there.
    """

    def __init__(self, change: _changes.AverageAccumulation) -> None:
        del change
        self._passes: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._stamps: WeakKeyDictionary[Optimizer, list[tuple[int, int]]] = WeakKeyDictionary()

    def before_backward(self, tensors: Sequence[Tensor], optimizers: Sequence[Optimizer]) -> None:
        for optimizer in optimizers:
            if not largest_entry(gradients_of(optimizer)):
                self._passes[optimizer] = 0
            self._stamps[optimizer] = _versions(optimizer)

    def after_backward(self, optimizers: Sequence[Optimizer]) -> None:
        for optimizer in optimizers:
            if self._stamps.get(optimizer) != _versions(optimizer):
                self._passes[optimizer] = self._passes.get(optimizer, 0) + 1

    def change_gradients(self, optimizer: Optimizer) -> None:
        passes = self._passes.get(optimizer, 0)
        if passes > 1:
            torch._foreach_div_(gradients_of(optimizer), passes)


def _versions(optimizer: Optimizer) -> list[tuple[int, int]]:
    """Which gradient tensors there are, and how often each was written to."""
    return [(id(gradient), gradient._version) for gradient in gradients_of(optimizer)]


class Zeroing(StepEffect):
    """`ZeroGradients`: what a step has used is cleared before the next backward pass adds to it."""

    def __init__(self, change: _changes.ZeroGradients) -> None:
        del change
        self._used: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()

    def before_backward(self, tensors: Sequence[Tensor], optimizers: Sequence[Optimizer]) -> None:
        for optimizer in optimizers:
            if self._used.get(optimizer):
                for parameter in parameters_of(optimizer):
                    parameter.grad = None
                self._used[optimizer] = False

    def change_gradients(self, optimizer: Optimizer) -> None:
        self._used[optimizer] = True  # a closure may run several passes in one step: each begins from nothing


class LossScaling(StepEffect):
    """`ScaleLoss`: the backward pass starts from `scale`, and its gradients are divided by it as it ends.

    The loss itself is not touched. What the gradients held before is scaled along, so that passes add up; with a power
    of two nothing is rounded.
    """

    def __init__(self, change: _changes.ScaleLoss) -> None:
        self._scale = change.scale
        self._handles: list[Any] = []

    def before_backward(self, tensors: Sequence[Tensor], optimizers: Sequence[Optimizer]) -> None:
        self._release()
        self._handles = [t.register_hook(self._enlarge) for t in tensors if t.requires_grad]  # type: ignore[no-untyped-call]
        self._multiply(optimizers, self._scale)

    def after_backward(self, optimizers: Sequence[Optimizer]) -> None:
        self._release()
        self._multiply(optimizers, 1 / self._scale)

    def _enlarge(self, gradient: Tensor) -> Tensor:
        return gradient * self._scale

    def _release(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _multiply(self, optimizers: Sequence[Optimizer], factor: float) -> None:
        found = {id(gradient): gradient for optimizer in optimizers for gradient in gradients_of(optimizer)}
        for gradient in found.values():
            gradient.mul_(factor)


# ---- bad steps --------------------------------------------------------------------------------------------------


class Skipping:
    """`SkipBadSteps`: hides gradients with NaN or Inf from the optimizer, and gives them back after its step.

    Optimizers of torch leave a parameter without gradient alone in every bit, momentum, decay and counters included.
    Of others, and of L-BFGS, the weights and the state are copied before such a step and put back after it. Looking
    waits for the device once a step.
    """

    def __init__(self, on_skip: Callable[[Optimizer], None]) -> None:
        self._on_skip = on_skip
        self._hidden: WeakKeyDictionary[Optimizer, list[tuple[Tensor, Tensor]]] = WeakKeyDictionary()
        self._copies: WeakKeyDictionary[Optimizer, tuple[list[Tensor], dict[Any, Any]]] = WeakKeyDictionary()

    def hide(self, optimizer: Optimizer) -> None:
        """Before the step, or once a closure has computed the gradients inside it."""
        if optimizer in self._hidden or math.isfinite(largest_entry(gradients_of(optimizer))):
            return
        self._on_skip(optimizer)
        self.leave_out(optimizer)

    def leave_out(self, optimizer: Optimizer) -> None:
        """Let the step that comes change nothing."""
        self._hidden[optimizer] = [(p, p.grad) for p in with_gradients(optimizer) if p.grad is not None]
        if not type(optimizer).__module__.startswith("torch.optim.") or isinstance(optimizer, LBFGS):
            weights = [parameter.detach().clone() for parameter in parameters_of(optimizer)]
            self._copies[optimizer] = weights, _copy_state(optimizer)
        for parameter, _ in self._hidden[optimizer]:
            parameter.grad = None

    def forget(self, optimizer: Optimizer, *, gradients: bool = True) -> None:
        """The step has raised in the program, or was never made: give back the gradients, but for those of a batch
        that another one has followed. Weights are not written to, for a forward pass may have begun.
        """
        self._copies.pop(optimizer, None)
        if not gradients:
            self._hidden.pop(optimizer, None)
        self.give_back(optimizer)

    def give_back(self, optimizer: Optimizer) -> None:
        """After the step."""
        if optimizer in self._copies:
            weights, state = self._copies.pop(optimizer)
            for parameter, before in zip(parameters_of(optimizer), weights, strict=True):
                parameter.detach().copy_(before)
            optimizer.state.clear()
            optimizer.state.update(state)
        for parameter, gradient in self._hidden.pop(optimizer, []):
            parameter.grad = gradient


def _copy_state(optimizer: Optimizer) -> dict[Any, Any]:
    """The state by the same parameters, with copies of everything that it holds."""
    return {parameter: copy.deepcopy(held) for parameter, held in optimizer.state.items()}


# ---- hyperparameters ----------------------------------------------------------------------------------------------


class RateMultiplication(StepEffect):
    """Multiplies every group's learning rate for the duration of the step: the program's scheduler never sees it."""

    def __init__(self, make: Callable[[], Multiplier]) -> None:
        self._multipliers = Succession(make)
        self._own: WeakKeyDictionary[Optimizer, list[tuple[Group, Any]]] = WeakKeyDictionary()

    def adopt(self, optimizer: Optimizer, roots: Sequence[nn.Module]) -> str:
        if any("lr" not in group for group in optimizer.param_groups):
            raise CannotApply(f"{type(optimizer).__name__} has no learning rate.")
        # A scheduler may have lowered the rate already (a warm-up does at once): then the group remembers its own.
        self._multipliers.of(optimizer).begin(
            [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        )
        return ""

    def before_backward(self, tensors: Sequence[Tensor], optimizers: Sequence[Optimizer]) -> None:
        for optimizer in optimizers:
            self._multipliers.of(optimizer).see_loss(tensors)

    def before_step(self, optimizer: Optimizer) -> None:
        self._restore(optimizer)  # a step that raised has left its rates behind
        self._own[optimizer] = [(group, group["lr"]) for group in optimizer.param_groups]
        multiplier = self._multipliers.of(optimizer)
        for index, (group, rate) in enumerate(self._own[optimizer]):
            group["lr"] = multiplier.rate(index, rate)

    def after_step(self, optimizer: Optimizer) -> None:
        self._restore(optimizer)
        self._multipliers.of(optimizer).advance()

    def _restore(self, optimizer: Optimizer) -> None:
        for group, rate in self._own.pop(optimizer, []):
            group["lr"] = rate

    def undo(self, optimizer: Optimizer) -> str | None:
        self._restore(optimizer)
        return None


class Setting(StepEffect):
    """`SetHyperparameter` for anything but the learning rate: in the optimizer's groups, also in those added later."""

    def __init__(self, change: _changes.SetHyperparameter) -> None:
        self._change = change
        self._before: WeakKeyDictionary[Optimizer, list[tuple[Group, Any, Any]]] = WeakKeyDictionary()

    def adopt(self, optimizer: Optimizer, roots: Sequence[nn.Module]) -> str:
        self._before[optimizer] = []
        self.before_step(optimizer)
        return ""

    def before_step(self, optimizer: Optimizer) -> None:
        done = self._before[optimizer]
        for group in optimizer.param_groups:
            if all(known is not group for known, _, _ in done):
                done.append((group, *self._set(optimizer, group)))

    def _set(self, optimizer: Optimizer, group: Group) -> tuple[Any, Any]:
        """(before, now) of what the group holds under the key."""
        key, place = _place(self._change.name)
        if key not in group:
            raise CannotApply(f"{type(optimizer).__name__} has no hyperparameter {self._change.name}.")
        before = group[key]
        old = before if place is None else before[place]
        value = self._change.value if self._change.factor is None else old * self._change.factor
        now = value if place is None else tuple(value if i == place else one for i, one in enumerate(before))
        group[key] = now
        if key == "momentum" and isinstance(optimizer, RMSprop):
            for held in optimizer.state.values():  # it looks for a buffer wherever there is momentum
                held.setdefault("momentum_buffer", torch.zeros_like(held["square_avg"]))
        return before, now

    def undo(self, optimizer: Optimizer) -> str | None:
        key, _ = _place(self._change.name)
        for group, before, now in self._before.pop(optimizer, []):
            if group.get(key) == now:
                group[key] = before
                _forget_momentum(optimizer, group, key)
        return None


def _forget_momentum(optimizer: Optimizer, group: Group, key: str) -> None:
    """Without momentum there is no buffer for it: one that was begun would be taken up by a later momentum."""
    if key == "momentum" and not group[key]:
        for parameter in group["params"]:
            optimizer.state.get(parameter, {}).pop("momentum_buffer", None)


def _place(name: str) -> tuple[str, int | None]:
    """The key of a hyperparameter in a group, and its place where the key holds a pair."""
    return ("betas", int(name[-1]) - 1) if name in ("beta1", "beta2") else (name, None)


def set_hyperparameter(change: _changes.SetHyperparameter) -> StepEffect:
    """The effect of a `SetHyperparameter`: learning rates are multiplied at the step, the rest is set."""
    return RateMultiplication(lambda: multiplier_of(change)) if change.name == "lr" else Setting(change)


def schedule_learning_rate(change: _changes.ScheduleLearningRate) -> StepEffect:
    """The effect of a `ScheduleLearningRate`."""
    multiplier_of(change)  # what torch does not allow is said at once
    return RateMultiplication(lambda: multiplier_of(change))


# ---- weights ------------------------------------------------------------------------------------------------------


class Clamping(StepEffect):
    """`ClampWeights`: after each step every trained weight is in [-limit, limit]."""

    def __init__(self, change: _changes.ClampWeights) -> None:
        self._limit = change.limit
        self._clamped: WeakSet[Optimizer] = WeakSet()

    def after_step(self, optimizer: Optimizer) -> None:
        self._clamped.add(optimizer)
        for parameter in parameters_of(optimizer):
            if parameter.requires_grad and not parameter.is_complex():
                parameter.detach().clamp_(-self._limit, self._limit)

    def undo(self, optimizer: Optimizer) -> str | None:
        if optimizer not in self._clamped:
            return None
        return f"Weights that were clamped stay in [-{self._limit:g}, {self._limit:g}] until they are trained further."


_NORMALIZED = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "SparseAdam")


class UpdateClipping(StepEffect):
    """`ClipUpdates`: w <- w0 + (w - w0) min(1, limit lr / RMS(w - w0)), per tensor, decoupled decay left out of w - w0.

    StableAdamW (Wortsman et al. 2023, arXiv:2304.13013) divides the rate by max(1, RMS(g / sqrt(v))); here the RMS of
    the step itself counts, momentum included.
    """

    def __init__(self, change: _changes.ClipUpdates) -> None:
        self._limit = change.limit
        self._before: WeakKeyDictionary[Optimizer, list[Tensor]] = WeakKeyDictionary()

    def adopt(self, optimizer: Optimizer, roots: Sequence[nn.Module]) -> str:
        if not any(cls.__name__ in _NORMALIZED for cls in type(optimizer).__mro__):
            name = type(optimizer).__name__
            raise CannotApply(f"A step of {name} is not normalized by the gradient's size: clip gradients instead.")
        return ""

    def before_step(self, optimizer: Optimizer) -> None:
        self._before[optimizer] = [parameter.detach().clone() for parameter in parameters_of(optimizer)]

    def after_step(self, optimizer: Optimizer) -> None:
        olds = iter(self._before.pop(optimizer, []))
        for group in optimizer.param_groups:
            decoupled = group.get("decoupled_weight_decay", "AdamW" in type(optimizer).__name__)
            decay = 1 - float(group["lr"]) * group.get("weight_decay", 0.0) if decoupled else 1.0
            for parameter, old in zip(group["params"], olds, strict=False):
                _shorten(parameter.detach(), old * decay, self._limit * float(group["lr"]))


def _shorten(weights: Tensor, old: Tensor, allowed: float) -> None:
    """Move `weights` back toward `old` so that the RMS of the way is at most `allowed`."""
    way = weights - old
    size = torch.linalg.vector_norm(way.float()) / math.sqrt(max(1, way.numel()))
    if weights.numel() and math.isfinite(size) and size > allowed:
        weights.copy_(old + way * (allowed / size))
