"""Closed forms of signal propagation in wide networks: what an initialization does before any data is seen.

Mean-field theory (Poole et al. 2016, Schoenholz et al. 2017): with weights of variance sigma_w^2 / fan_in, biases of
variance sigma_b^2 and pre-activations z ~ N(0, q),

    q'  = sigma_w^2 E[phi(z)^2] + sigma_b^2      the length map, forward
    chi = sigma_w^2 E[phi'(z)^2]                 the factor of the squared gradient norm per layer, backward

so that the gradient norm changes by sqrt(chi) per layer. ReLU and its leaky form (He et al. 2015) and GELU are in
closed form, the rest by quadrature. Kinds are those of `Layer.kind`; "identity" stands for no activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Function = Callable[[Floats], Floats]

LEAKY_SLOPE = 0.01
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805

_GRID = np.linspace(-10.0, 10.0, 4001)
_WEIGHTS = np.exp(-(_GRID**2) / 2) / math.sqrt(2 * math.pi) * (_GRID[1] - _GRID[0])
"""Trapezoid rule for E[f(z)], z ~ N(0, 1): exact to 1e-12 for smooth f, to 1e-5 for a jump at zero (tails: 1e-23).
Gauss-Hermite nodes converge faster for smooth f and much slower for kinked activations."""


def _sigmoid(z: Floats) -> Floats:
    return 0.5 * (1.0 + np.tanh(z / 2.0))


def _below(z: Floats) -> Floats:
    """exp(z) for z < 0 and 1 otherwise, without overflow."""
    return np.exp(np.minimum(z, 0.0))


def _step(z: Floats) -> Floats:
    return np.heaviside(z, 0.5)


def _softplus(z: Floats) -> Floats:
    return np.maximum(z, 0.0) + np.log1p(np.exp(-np.abs(z)))


def _elu(z: Floats) -> Floats:
    return np.where(z > 0, z, _below(z) - 1.0)


def _selu(z: Floats) -> Floats:
    return SELU_SCALE * np.where(z > 0, z, SELU_ALPHA * (_below(z) - 1.0))


def _selu_slope(z: Floats) -> Floats:
    return SELU_SCALE * np.where(z > 0, 1.0, SELU_ALPHA * _below(z))


def _silu_slope(z: Floats) -> Floats:
    gate = _sigmoid(z)
    return gate * (1.0 + z * (1.0 - gate))


def _leaky_slope(z: Floats) -> Floats:
    return np.where(z > 0, 1.0, LEAKY_SLOPE)


_QUADRATURE: dict[str, tuple[Function, Function]] = {
    "tanh": (np.tanh, lambda z: 1.0 - np.tanh(z) ** 2),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * (1.0 - _sigmoid(z))),
    "silu": (lambda z: z * _sigmoid(z), _silu_slope),
    "elu": (_elu, _below),
    "selu": (_selu, _selu_slope),
    "softplus": (_softplus, _sigmoid),
    "hardtanh": (lambda z: np.clip(z, -1.0, 1.0), lambda z: (np.abs(z) < 1.0).astype(np.float64)),
    "softsign": (lambda z: z / (1.0 + np.abs(z)), lambda z: 1.0 / (1.0 + np.abs(z)) ** 2),
}

KINDS = frozenset(_QUADRATURE) | {"relu", "leaky-relu", "gelu", "identity"}
"""Activations that the theory covers."""

BOUNDED = frozenset({"sigmoid", "tanh", "hardtanh", "softsign"})
"""Activations with a bounded range, whose slope vanishes on both sides."""


def mean_square(kind: str, q: float) -> float:
    """E[phi(z)^2] for z ~ N(0, q). Raises ValueError for an activation that the theory does not cover."""
    if kind == "identity":
        return q
    if kind in ("relu", "leaky-relu"):
        return q * (1.0 + _negative_slope(kind) ** 2) / 2.0
    if kind == "gelu":
        return q / 4 + q / (2 * math.pi) * math.asin(q / (1 + q)) + q**2 / (math.pi * (1 + q) * math.sqrt(1 + 2 * q))
    return _expectation(_functions(kind)[0], q)


def mean_square_slope(kind: str, q: float) -> float:
    """E[phi'(z)^2] for z ~ N(0, q). Raises ValueError for an activation that the theory does not cover."""
    if kind == "identity":
        return 1.0
    if kind in ("relu", "leaky-relu"):
        return (1.0 + _negative_slope(kind) ** 2) / 2.0
    if kind == "gelu":
        tail = q * (3 + 5 * q) / (2 * math.pi * (1 + q) * math.pow(1 + 2 * q, 1.5))
        return 0.25 + math.asin(q / (1 + q)) / (2 * math.pi) + tail
    return _expectation(_functions(kind)[1], q)


def _negative_slope(kind: str) -> float:
    return LEAKY_SLOPE if kind == "leaky-relu" else 0.0


def _functions(kind: str) -> tuple[Function, Function]:
    if kind not in _QUADRATURE:
        raise ValueError(f"signal propagation through {kind!r} is not known; known are {', '.join(sorted(KINDS))}")
    return _QUADRATURE[kind]


def _expectation(function: Function, q: float) -> float:
    return float(np.sum(_WEIGHTS * function(math.sqrt(q) * _GRID) ** 2))


def length_map(kind: str, q: float, *, weight_variance: float, bias_variance: float = 0.0) -> float:
    """The next layer's pre-activation variance: sigma_w^2 E[phi(z)^2] + sigma_b^2 (Poole et al. 2016)."""
    return weight_variance * mean_square(kind, q) + bias_variance


def fixed_point(
    kind: str, *, weight_variance: float, bias_variance: float = 0.0, q: float = 1.0, layers: int = 10_000
) -> float:
    """The variance that the length map settles at after at most `layers` layers; infinite when it runs away."""
    for _ in range(layers):
        mapped = length_map(kind, q, weight_variance=weight_variance, bias_variance=bias_variance)
        if not mapped < 1e30:
            return math.inf
        if abs(mapped - q) <= 1e-12 * max(q, 1e-30):
            return mapped
        q = mapped
    return q


def chi(kind: str, q: float, *, weight_variance: float) -> float:
    """The factor of the squared gradient norm per layer: sigma_w^2 E[phi'(z)^2] (Schoenholz et al. 2017)."""
    return weight_variance * mean_square_slope(kind, q)


def gradient_factor(kind: str, q: float, *, weight_variance: float) -> float:
    """The factor of the gradient norm per layer: sqrt(chi). Below 1 gradients vanish with depth, above 1 explode."""
    return math.sqrt(chi(kind, q, weight_variance=weight_variance))


@lru_cache(maxsize=4096)
def critical_weight_variance(kind: str, q: float = 1.0) -> float:
    """sigma_w^2 at which chi = 1 where pre-activations have variance q: 2 for ReLU, 1 for no activation."""
    return 1.0 / mean_square_slope(kind, q)


def critical_std(kind: str, fan_in: int, q: float = 1.0) -> float:
    """Standard deviation of critical weights, sqrt(sigma_w^2 / fan_in): He et al. (2015) for ReLU. `fan_in` >= 1."""
    return math.sqrt(critical_weight_variance(kind, q) / fan_in)


@lru_cache(maxsize=64)
def largest_slope(kind: str) -> float:
    """sup |phi'|: 1/4 for sigmoid, 1 for tanh. The most that one layer's activation lets through."""
    if kind in ("relu", "leaky-relu", "identity"):
        return 1.0
    if kind == "gelu":
        return 1.1289  # at z = sqrt(2): Phi(z) + z phi(z)
    return float(np.max(np.abs(_functions(kind)[1](_GRID))))


def batch_norm_factor(batch: int) -> float:
    """The factor of the squared gradient norm per layer of a ReLU network with batch normalization, 4 or more rows.

    Theorem 8 of Yang et al. (2019), "A Mean Field Theory of Batch Normalization": pi / (pi - 1) = 1.467 for large
    batches, more for small ones. It is above 1: batch normalization makes plain deep networks explode.
    """
    if batch < 4:
        raise ValueError(f"the theorem needs a batch of at least 4, not {batch}")
    c = -1.0 / (batch - 1)
    slope = (math.pi - math.acos(c)) / math.pi
    value = (math.sqrt(1 - c**2) + (math.pi - math.acos(c)) * c) / math.pi
    # J(1) = J'(1) = 1 for the normalized arc-cosine kernel.
    return (batch - 1) * (slope + batch - 1) / ((batch - 3) * (batch - 1) * (1 - value)) - 1 / (batch - 3)
