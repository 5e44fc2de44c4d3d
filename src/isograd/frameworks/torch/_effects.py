"""The contract of a change that acts around backward passes and optimizer steps, and what such changes share."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isograd.frameworks.torch import _kernels as kernels

OWN: WeakSet[Optimizer] = WeakSet()
"""Optimizers that isograd made itself: nobody's program steps them."""


class StepEffect:
    """One change in effect, for every optimizer that it was given. Each method is called without autograd.

    What an optimizer needs between calls is kept weakly: an effect keeps no optimizer alive.
    """

    def adopt(self, optimizer: Optimizer, roots: Sequence[nn.Module]) -> str:
        """Take effect on an optimizer over these models; what that means there, in words. Raises CannotApply."""
        del optimizer, roots
        return ""

    def before_backward(self, tensors: Sequence[Tensor], optimizers: Sequence[Optimizer]) -> None:
        """An outermost backward pass that fills gradients begins."""

    def after_backward(self, optimizers: Sequence[Optimizer]) -> None:
        """It has ended."""

    def change_gradients(self, optimizer: Optimizer) -> None:
        """Gradients are complete: as the optimizer is to see them."""

    def before_step(self, optimizer: Optimizer) -> None:
        """The step is about to happen."""

    def after_step(self, optimizer: Optimizer) -> None:
        """The step has happened. The effects that came last before the step come first here."""

    def undo(self, optimizer: Optimizer) -> str | None:
        """Put the optimizer back; a sentence where something stays changed."""


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Every parameter of an optimizer, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def with_gradients(optimizer: Optimizer) -> list[Tensor]:
    """The parameters that hold a gradient."""
    return [parameter for parameter in parameters_of(optimizer) if parameter.grad is not None]


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients themselves."""
    return [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]


def largest_entry(gradients: Sequence[Tensor]) -> float:
    """The largest magnitude among all entries; NaN or Inf where there is one. Waits for the device."""
    plain = [kernels.real(gradient) for gradient in gradients]
    peaks = kernels.largest([tensor for tensor in plain if tensor.numel()])
    # The maximum of torch propagates NaN, Python's does not.
    return float(torch.stack([peak.float().to(peaks[0].device) for peak in peaks]).max()) if peaks else 0.0


def unscale(optimizer: Optimizer) -> None:
    """Divide gradients by the loss scale where a `GradScaler` leaves that to a fused step, which then finds 1."""
    scale = getattr(optimizer, "grad_scale", None)
    if isinstance(scale, Tensor):
        for gradient in gradients_of(optimizer):
            gradient.div_(scale.to(gradient.device))
        optimizer.grad_scale = torch.ones_like(scale)  # type: ignore[attr-defined]
