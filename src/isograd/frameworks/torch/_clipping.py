"""Ways to clip gradients in place. What torch has is torch's; ours are the adaptive ones and those by history.

Every one of them keeps finite gradients finite, leaves gradients within the limit alone in every bit, and expects that
no entry is NaN or Inf (`ClipGradients` looks first): `clip_grad_norm_` turns one Inf into NaN.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import utils

Clip = Callable[[Sequence[Tensor]], None]
"""Clips the gradients of parameters that all have one."""


def clip_value(parameters: Sequence[Tensor], limit: float) -> None:
    """Every entry into [-limit, limit]; this changes the direction."""
    utils.clip_grad_value_(parameters, limit)


def clip_norm(parameters: Sequence[Tensor], limit: float) -> float:
    """All gradients together to an L2 norm of at most `limit` (Pascanu et al. 2013); returns the norm before.

    A norm that overflows although no entry does is taken of the scaled gradients: torch would return zeros.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = float(utils.get_total_norm(gradients))
    if not math.isinf(norm):
        utils.clip_grad_norm_(parameters, limit)
        return norm
    peak = max(float(gradient.abs().max()) for gradient in gradients if gradient.numel())
    torch._foreach_div_(gradients, peak)
    torch._foreach_mul_(gradients, limit / float(utils.get_total_norm(gradients)))
    return math.inf


def clip_tensor_norms(parameters: Sequence[Tensor], limit: float) -> None:
    """Each gradient on its own to an L2 norm of at most `limit`."""
    for parameter in parameters:
        clip_norm([parameter], limit)


def clip_adaptively(parameters: Sequence[Tensor], limit: float, *, floor: float = 1e-3) -> None:
    """Each unit's gradient to at most `limit` times the norm of its weights, taken as at least `floor`.

    Adaptive gradient clipping, Brock et al. 2021, arXiv:2102.06171, equation 3: g_i <- limit max(|W_i|, floor) / |g_i|
    g_i where that is shorter. A unit is a row of a matrix, an output channel of a kernel, a whole vector.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None or gradient.layout != torch.strided or not gradient.numel():
            continue
        allowed = limit * _unit_norms(parameter.detach()).clamp(min=floor)
        lengths = _unit_norms(gradient)
        factor = torch.where(lengths > allowed, allowed / lengths.clamp(min=torch.finfo(lengths.dtype).tiny), 1.0)
        gradient.mul_(factor.to(gradient.dtype))


def _unit_norms(tensor: Tensor) -> Tensor:
    """L2 norm over all axes but the first, shaped to broadcast; of everything where there is one axis only."""
    axes = tuple(range(1, tensor.dim())) or None
    # In float64, in which no sum of squares of float32 entries overflows.
    norms: Tensor = torch.linalg.vector_norm(tensor.double(), dim=axes, keepdim=True)
    return norms


class PercentileClip:
    """AutoClip (Seetharaman et al. 2020, arXiv:2007.14469): the limit is a percentile of all norms so far.

    `percentile`: between 0 and 100. The current norm belongs to the history; the percentile interpolates linearly.
    """

    def __init__(self, percentile: float) -> None:
        self.percentile = percentile
        self._norms: list[float] = []

    def limit_after(self, norm: float) -> float:
        """Add a norm and return the limit that holds for it."""
        insort(self._norms, norm)
        place = (len(self._norms) - 1) * self.percentile / 100
        below = math.floor(place)
        low, high = self._norms[below], self._norms[min(below + 1, len(self._norms) - 1)]
        return low + (high - low) * (place - below)


class ZScoreClip:
    """ZClip (Kumar et al. 2025, arXiv:2504.02507): norms far above their moving average are cut back.

    With z = (norm - mean) / std above `limit` z0, the norm becomes mean + z0^2 std / z. Mean and variance are those of
    the first 25 norms, then moving averages with factor 0.97 of the norms after clipping; the paper's settings.
    """

    def __init__(self, limit: float, *, decay: float = 0.97, warm_up: int = 25) -> None:
        self.limit, self.decay, self.warm_up = limit, decay, warm_up
        self._first: list[float] = []
        self.mean, self.variance = 0.0, 0.0

    def limit_after(self, norm: float) -> float:
        """Add a norm and return the limit that holds for it; infinite during warm-up."""
        if len(self._first) < self.warm_up:
            self._first.append(norm)
            self.mean = sum(self._first) / len(self._first)
            self.variance = sum((one - self.mean) ** 2 for one in self._first) / len(self._first)
            return math.inf
        clipped = self._clipped(norm)
        self.mean = self.decay * self.mean + (1 - self.decay) * clipped
        self.variance = self.decay * self.variance + (1 - self.decay) * (clipped - self.mean) ** 2
        return clipped if clipped < norm else math.inf

    def _clipped(self, norm: float) -> float:
        std = math.sqrt(self.variance)
        score = (norm - self.mean) / (std + 1e-6)
        return self.mean + self.limit**2 * std / score if score > self.limit else norm


def clip_by_history(parameters: Sequence[Tensor], history: PercentileClip | ZScoreClip) -> None:
    """All gradients together to the norm that the history of norms allows."""
    norm = float(utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if math.isfinite(norm):
        limit = history.limit_after(norm)
        if limit < norm:
            clip_norm(parameters, limit)
