"""Standardize what enters a model, and what it is asked for, by the statistics of the first batches."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from isograd import _changes
from isograd.frameworks.torch import _calls as calls
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch import _passage as passages
from isograd.frameworks.torch._surgery import ModelEffect, Site


class Moments:
    """Mean and standard deviation along an axis over everything added, in float64; entries that are not finite are
    left out. `axis`: the axis of features, None for one feature. A feature that does not vary has deviation 1.
    """

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.batches = 0
        self._count: Any = 0.0
        self._mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, values: Tensor) -> None:
        """One batch. Chan et al. 1979 for the sum of squares."""
        rows = self._rows(values.detach().double())
        finite = torch.isfinite(rows)
        count = finite.sum(0).double()
        rows = torch.where(finite, rows, 0.0)
        mean = rows.sum(0) / count.clamp(min=1)
        squares = (torch.where(finite, rows - mean, 0.0) ** 2).sum(0)
        total = self._count + count
        gap = mean - self._mean
        self._squares = self._squares + squares + gap**2 * self._count * count / total.clamp(min=1)
        self._mean = self._mean + gap * count / total.clamp(min=1)
        self._count = total
        self.batches += 1

    def _rows(self, values: Tensor) -> Tensor:
        return values.reshape(-1, 1) if self.axis is None else values.movedim(self.axis, -1).flatten(0, -2)

    def like(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation) shaped to broadcast against `values`."""
        mean = self._mean.to(values.device)
        std = (self._squares / self._count.clamp(min=1)).sqrt().to(values.device)
        std = torch.where(std > 1e-12 * mean.abs(), std, 1.0)
        shape = [1] * values.dim()
        if self.axis is not None:
            shape[self.axis] = -1
        return mean.reshape(shape).to(values.dtype), std.reshape(shape).to(values.dtype)


class InputStandardization(ModelEffect):
    """`StandardizeInputs`: (x - mean) / std of every floating-point tensor given to the outermost call, per feature.

    Features are the channels of images and of what a convolution takes, else the last axis. The moments grow over the
    first batches in training mode, and stand still from then on. What the model itself has returned (a carried state)
    is no input.
    """

    left = "The weights have been trained on standardized inputs."

    def __init__(self, change: _changes.StandardizeInputs, site: Site, back: ExitStack) -> None:
        self._batches, self._site = change.batches, site
        self._moments: dict[Any, Moments] = {}
        first = next((describe.kind_of(m) for _, m in site.layers(("linear", "conv", *_RECURRENT))), "linear")
        self._of_convolution = first == "conv"
        self._returned: set[int] = set()
        site.passage.entering.append(self._enter)
        back.callback(site.passage.entering.remove, self._enter)
        site.passage.leaving.append(self._leave)
        back.callback(site.passage.leaving.remove, self._leave)

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = tuple(self._standardize(index, value) for index, value in enumerate(args))
        return given, {name: self._standardize(name, value) for name, value in kwargs.items()}

    def _standardize(self, key: Any, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_nested or not value.is_floating_point():
            return value
        if not value.dim() or not value.numel():
            return value
        if value.untyped_storage().data_ptr() in self._returned:
            return value
        moments = self._moments.setdefault(key, Moments(self._axis(value)))
        learns = torch.is_grad_enabled() and self._site.root.training
        if learns and moments.batches < self._batches and calls.is_data(value):
            moments.add(value)
        if not moments.batches:
            return value
        mean, std = moments.like(value)
        return (value - mean) / std

    def _axis(self, value: Tensor) -> int | None:
        if value.dim() == 1:
            return None
        return 1 if value.dim() >= 4 or (self._of_convolution and value.dim() == 3) else -1

    def _leave(self, output: Any) -> Any:
        self._returned = {tensor.untyped_storage().data_ptr() for tensor in _tensors(output)}
        return output

    def unmet(self) -> str | None:
        return None if self._moments else "No floating-point tensor enters the model."


_RECURRENT = ("rnn", "lstm", "gru", "rnn-cell", "lstm-cell", "gru-cell")


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(value, (tuple, list)):
        return [tensor for one in value for tensor in _tensors(one)]
    return [value] if isinstance(value, Tensor) else []


class _Affine(torch.autograd.Function):
    """x * std + mean, whose gradient is multiplied with `factor` instead of `std`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, std: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x * std + mean

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (factor,) = ctx.saved_tensors
        return gradients[0] * factor, None, None, None


_LOSSES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
_LINEAR_LOSSES = ("l1_loss",)


class TargetStandardization(ModelEffect):
    """`StandardizeTargets`: the model's result r becomes r * std + mean, so that the network works on targets of mean 0
    and deviation 1 while the program's loss stays in its own units.

    The backward pass is that of the loss on standardized targets: for a squared error dL/dr is divided by std (its
    gradient with respect to r * std + mean is std times that of the standardized loss, and r * std brings another std),
    for an absolute error it passes unchanged. Targets are seen where the first batches' loss is computed: as the second
    argument of torch's regression losses, or as what is subtracted from the result. The first batch's result, which
    stands before its targets are known, is put into their units inside its loss.
    """

    left = "The weights have been trained on standardized targets: the model's results are not in the targets' units."

    def __init__(self, change: _changes.StandardizeTargets, site: Site, back: ExitStack) -> None:
        self._batches, self._site = change.batches, site
        self._moments: Moments | None = None
        self._is_linear = False
        self._inside = False
        self._waits = False
        site.passage.leaving.append(self._leave)
        back.callback(site.passage.leaving.remove, self._leave)
        self._watched = ExitStack()
        back.callback(self._watched.close)
        for owner, name in _places_of_losses():
            self._watch(owner, name)

    # ---- the result -------------------------------------------------------------------------------------------------

    def _leave(self, output: Any) -> Any:
        if not self._site.passage.at_output:
            return output
        self._waits = self._moments is None
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (self._in_units(output[0]), *output[1:])
        return self._in_units(output) if isinstance(output, Tensor) else output

    def _in_units(self, result: Tensor) -> Tensor:
        if self._moments is None or not result.is_floating_point():
            return result
        mean, std = self._moments.like(result)
        return _Affine.apply(result, mean, std, torch.ones_like(std) if self._is_linear else 1 / std)  # type: ignore[no-any-return, no-untyped-call]

    # ---- the targets ------------------------------------------------------------------------------------------------

    def _watch(self, owner: Any, name: str) -> None:
        original, inherited = getattr(owner, name), name not in vars(owner)
        kind = getattr(original, "__name__", name)  # the program may have imported it under another name

        def compare(*args: Any, **kwargs: Any) -> Any:
            if self._inside or self._site.passage.depth or not self._site.passage.at_output:
                return original(*args, **kwargs)
            self._inside = True
            try:
                args, kwargs = self._compared(kind, args, kwargs)
            finally:
                self._inside = False
            return original(*args, **kwargs)

        setattr(owner, name, compare)
        self._watched.callback(_restore, owner, name, compare, None if inherited else original)

    def _compared(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        first: Any = args[0] if args else kwargs.get("input")
        second: Any = args[1] if len(args) > 1 else kwargs.get("target", kwargs.get("other"))
        if not (self._is_result(first) and _is_target(second, first)):
            if not (self._is_result(second) and _is_target(first, second)):
                return args, kwargs
            return (first, self._learn(name, second, first), *args[2:]), kwargs
        if args:
            return (self._learn(name, first, second), *args[1:]), kwargs
        return args, {**kwargs, "input": self._learn(name, first, second)}

    def _learn(self, name: str, result: Tensor, target: Tensor) -> Tensor:
        """The result, in the targets' units where it was not yet."""
        if not self._site.root.training or (self._moments is None and not self._waits):
            return result
        if self._moments is None:
            self._moments = Moments(1 if target.dim() == 2 and target.shape == result.shape else None)
            self._is_linear = name in _LINEAR_LOSSES
        self._moments.add(target)
        if self._moments.batches >= self._batches:
            self._watched.close()
        waited, self._waits = self._waits, False
        return self._in_units(result) if waited else result

    def _is_result(self, value: Any) -> bool:
        """Whether it is this model's result: another model's targets are its own."""
        return isinstance(value, Tensor) and value.requires_grad and self._site.passage.is_answer(value)

    def unmet(self) -> str | None:
        if self._moments is not None:
            return None
        self._watched.close()
        return "No regression target was seen: no loss subtracts one from the model's result."


def _restore(owner: Any, name: str, ours: Any, original: Any) -> None:
    """Put a function back, or take away what stood before the one that is inherited."""
    if vars(owner).get(name) is ours:
        delattr(owner, name) if original is None else setattr(owner, name, original)


def _places_of_losses() -> list[tuple[Any, str]]:
    losses: list[tuple[Any, str]] = [(functional, name) for name in _LOSSES]
    found = {id(getattr(functional, name)): name for name in _LOSSES}
    losses += [(namespace, name) for namespace, name, _ in passages.imported(found)]
    return [*losses, (torch.Tensor, "__sub__"), (torch.Tensor, "__rsub__"), (torch.Tensor, "sub"), (torch, "sub")]


def _is_target(value: Any, result: Tensor) -> bool:
    """Data as large as the result, and one value per sample at least."""
    return (
        isinstance(value, Tensor)
        and calls.is_data(value)
        and value.dim() > 0
        and value.shape[0] == result.shape[0]
        and value.numel() == result.numel()
    )
