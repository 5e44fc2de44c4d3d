"""Closed forms of signal propagation in wide networks: what an initialization does before any data is seen.

Mean-field theory (Poole et al. 2016, Schoenholz et al. 2017): with weights of variance sigma_w^2 / fan_in, biases of
variance sigma_b^2 and pre-activations z ~ N(0, q),

    q'  = sigma_w^2 E[phi(z)^2] + sigma_b^2      the length map, forward
    chi = sigma_w^2 E[phi'(z)^2]                 the factor of the squared gradient norm per layer, backward

so that the gradient norm changes by sqrt(chi) per layer. ReLU and its leaky form (He et al. 2015) and GELU are in
closed form, the rest by quadrature. Kinds are those of `Layer.kind`; "identity" stands for no activation.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Function = Callable[[Floats], Floats]

LEAKY_SLOPE = 0.01
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805

_GRID: Floats = (np.arange(16_000, dtype=np.float64) + 0.5) / 800.0 - 10.0
_WEIGHTS: Floats = np.exp(-(_GRID**2) / 2) / math.sqrt(2 * math.pi) * (_GRID[1] - _GRID[0])
"""Midpoint rule for E[f(z)], z ~ N(0, 1): exact to 1e-12 for smooth f, to 1e-5 for a kink or jump at zero or one, which
lie between nodes (tails: 1e-23). Gauss-Hermite nodes converge faster for smooth f and much slower for kinked ones."""

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(24)
_RADII = np.linspace(0.0, 10.0, 401)[:, None]
_RADIAL = _RADII * np.exp(-(_RADII**2) / 2) * _RADII[1] / (2 * math.pi)
"""For pairs, E[f(u, v)]: Gauss-Legendre over the angles of each sector between the lines u = 0 and v = 0, where
activations have their kinks, and a trapezoid rule over radii."""


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its derivative, both from float64 arrays to arrays of the same shape."""

    value: Function
    slope: Function


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
    """sigma_w^2 at which chi = 1 where pre-activations have variance q: 2 for ReLU, 1 for no activation.

    Infinite where q is so large that a bounded activation's slope is 0 nearly everywhere.
    """
    slope = mean_square_slope(kind, q)
    return 1.0 / slope if slope > 0 else math.inf


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
    return float(np.max(np.abs(_functions(kind)[1](np.append(_GRID, 0.0)))))


def batch_norm_factor(batch: int, kind: str = "relu") -> float:
    """The factor of the squared gradient norm per layer of a network with batch normalization, 4 or more rows.

    Theorem 8 of Yang et al. (2019), "A Mean Field Theory of Batch Normalization": pi / (pi - 1) = 1.467 for ReLU and
    large batches, more for small ones, (B - 2) / (B - 3) without activation. It is above 1: batch normalization makes
    plain deep networks explode. For other activations the theorem's steps with Gaussian normalized values.
    """
    one = function_of(kind)
    share, scale = batch_norm_shares(batch, one)
    return scale * share * slope_square(one, 1.0) / (square(one, 1.0) - pair(one, 1.0, -1.0 / (batch - 1)).value)


def batch_norm_shares(batch: float, following: Activation) -> tuple[float, float]:
    """(share, scale) by which batch normalization over `batch` rows departs from division by a known deviation.

    With normalized values u, v of correlation -1 / (B - 1) in two rows, gradients that sum to zero over the batch, as
    those from a later normalization do, keep the share 1 - (E[s^2] - E[ss'] + E[u^2 s^2] - E[uvss']) / (B E[s^2]) of
    their square under the projection, s = phi'(u) of the activation that follows; and E[B / |z|^2] over the B - 1
    centered entries of z is B / (B - 3) of 1 / Var(z). Raises ValueError below 4 rows.
    """
    if batch < 4:
        raise ValueError(f"the theorem needs a batch of at least 4, not {batch:g}")
    both, alone = pair(following, 1.0, -1.0 / (batch - 1)), slope_square(following, 1.0)
    weighted = expectation(lambda z: (z * following.slope(z)) ** 2, 1.0)
    return 1 - (alone - both.slope + weighted - both.weighted) / (batch * alone), batch / (batch - 3)


# ---- any elementwise function, single values and pairs ----------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """E[phi(u) phi(v)], E[phi'(u) phi'(v)] and E[u v phi'(u) phi'(v)] of two correlated Gaussians."""

    value: float
    slope: float
    weighted: float


def function_of(kind: str) -> Activation:
    """The activation of this kind with its usual constants. Raises ValueError for one that is not covered."""
    if kind in _CLOSED:
        return _CLOSED[kind]
    return Activation(*_functions(kind))


def expectation(function: Function, q: float) -> float:
    """E[f(z)] for z ~ N(0, q)."""
    return float(np.sum(_WEIGHTS * function(math.sqrt(q) * _GRID)))


def square(one: Activation, q: float) -> float:
    """E[phi(z)^2] for z ~ N(0, q)."""
    return expectation(lambda z: one.value(z) ** 2, q)


def slope_square(one: Activation, q: float) -> float:
    """E[phi'(z)^2] for z ~ N(0, q)."""
    return expectation(lambda z: one.slope(z) ** 2, q)


def pair(one: Activation, q: float, product: float) -> Pair:
    """Moments over u, v ~ N(0, q) with E[uv] = `product`, which is cut to [-q, q]."""
    lean = math.acos(min(1.0, max(-1.0, product / q))) if q > 0 else 0.0
    ends = np.array([-0.5 * math.pi, lean - 0.5 * math.pi, 0.5 * math.pi, lean + 0.5 * math.pi, 1.5 * math.pi])
    middles, halves = (ends[1:] + ends[:-1]) / 2, (ends[1:] - ends[:-1]) / 2
    angles = (middles[:, None] + halves[:, None] * _NODES).ravel()
    weights = _RADIAL * (halves[:, None] * _NODE_WEIGHTS).ravel()
    u = math.sqrt(q) * _RADII * np.cos(angles)
    v = math.sqrt(q) * _RADII * np.cos(angles - lean)
    values, slopes = one.value(u) * one.value(v), one.slope(u) * one.slope(v)
    return Pair(*(float(np.sum(weights * moment)) for moment in (values, slopes, u * v * slopes)))


@lru_cache(maxsize=256)
def largest_of(count: float, power: int, *, rectified: bool = False) -> float:
    """E[m^power] of the largest m of `count` independent N(0, 1); of max(m, 0) where `rectified`."""
    largest = np.maximum(_GRID, 0.0) if rectified else _GRID
    density = count * _normal_cdf(_GRID) ** (count - 1) * _WEIGHTS
    return float(np.sum(density * largest**power))


def _normal_cdf(z: Floats) -> Floats:
    return np.asarray(0.5 * (1.0 + _erf(z / math.sqrt(2))), dtype=np.float64)


_erf = np.vectorize(math.erf, otypes=[np.float64])

_CLOSED: dict[str, Activation] = {
    "identity": Activation(lambda z: z, np.ones_like),
    "relu": Activation(lambda z: np.maximum(z, 0.0), _step),
    "leaky-relu": Activation(lambda z: np.where(z > 0, z, LEAKY_SLOPE * z), _leaky_slope),
    "gelu": Activation(
        lambda z: z * _normal_cdf(z),
        lambda z: _normal_cdf(z) + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi),
    ),
}
"""Activations of which closed forms are known, as functions."""

IDENTITY = _CLOSED["identity"]


def parallel_chi(one: Activation, q: float, *, weight_variance: float) -> float:
    """sigma_w^2 dE[phi(z)^2]/dq: by how much a deviation of the variance grows per layer. Norms are stable below 1."""
    return weight_variance * expectation(lambda z: z * one.value(z) * one.slope(z), q) / q


@dataclass(frozen=True)
class CriticalPoint:
    """Variances of weights (times fan-in) and of biases at which signals keep their size, and the size they keep."""

    weight_variance: float
    bias_variance: float
    q: float


def critical_point(kind: str, *, low: float = 1e-2, high: float = 1e3) -> CriticalPoint:
    """Where chi = 1 both for gradients and for norms at a fixed point q > 0: the half-stable point of GELU and SiLU.

    Roberts, Yaida & Hanin (2022), The Principles of Deep Learning Theory, section 5.3.4. By bisection between `low`
    and `high`. Raises ValueError for activations that have no such point, among them those that are critical at q -> 0
    (tanh) or at every q (ReLU).
    """
    one = function_of(kind)

    def gap(q: float) -> float:
        return slope_square(one, q) - parallel_chi(one, q, weight_variance=1.0)

    # A gap of rounding alone is none: ReLU is critical at every q.
    if min(abs(gap(low)), abs(gap(high))) < 1e-9 or gap(low) * gap(high) > 0:
        raise ValueError(f"{kind!r} has no critical point at a finite size of the signal")
    falling = gap(low) > 0
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if (gap(middle) > 0) == falling else (low, middle)
    weights = 1 / slope_square(one, low)
    return CriticalPoint(weights, low - weights * square(one, low), low)


def critical_variances(kind: str) -> tuple[float, float]:
    """(C_W, C_b) at which neither gradients nor signals change their size from layer to layer.

    Roberts, Yaida & Hanin 2022: (1.983, 0.173) for GELU, (1.988, 0.555) for SiLU, (2, 0) for ReLU; odd activations such
    as tanh are critical for small signals: (1, 0). Where there is no such point, the weights that keep gradients where
    pre-activations have variance 1.
    """
    if kind == "identity":
        return 1.0, 0.0
    with contextlib.suppress(ValueError):
        point = critical_point(kind)
        return point.weight_variance, point.bias_variance
    small = kind in ("tanh", "softsign", "hardtanh")
    return critical_weight_variance(kind, 1e-6 if small else 1.0), 0.0


def edge_of_chaos(kind: str, bias_variance: float, *, low: float = 1e-3, high: float = 20.0) -> float:
    """The weight variance at which chi = 1 at the fixed point, for this bias variance (Schoenholz et al. 2017).

    Below it signals are forgotten and gradients vanish, above it they explode. By bisection between `low` and `high`;
    for activations of which chi at the fixed point grows with the weights' variance (tanh, erf, ReLU).
    """
    for _ in range(60):
        middle = (low + high) / 2
        q = fixed_point(kind, weight_variance=middle, bias_variance=bias_variance)
        ordered = math.isfinite(q) and chi(kind, q, weight_variance=middle) < 1
        low, high = (middle, high) if ordered else (low, middle)
    return low


# ---- steps that do not diverge ------------------------------------------------------------------------------------


def stable_sharpness(optimizer: str, *, momentum: float = 0.0, nesterov: bool = False) -> float:
    """The sharpness times learning rate at which full-batch training becomes unstable.

    2 for gradient descent, 2 + 2 beta with heavy-ball momentum, (2 + 2 beta) / (1 + 2 beta) with Nesterov's (Cohen et
    al. 2021, arXiv:2103.00065); (2 + 2 beta1) / (1 - beta1) of the preconditioned Hessian for Adam, 38 for beta1 = 0.9
    (Cohen et al. 2022, arXiv:2207.14484). `optimizer`: "sgd" or "adam".
    """
    limit = 2 + 2 * momentum
    if optimizer == "adam":
        return limit / (1 - momentum)
    return limit / (1 + 2 * momentum) if nesterov else limit
