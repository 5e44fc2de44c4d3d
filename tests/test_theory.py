"""Signal propagation against published numbers, Monte Carlo and numeric differentiation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isograd._theory import (
    KINDS,
    batch_norm_factor,
    chi,
    critical_std,
    critical_weight_variance,
    fixed_point,
    gradient_factor,
    largest_slope,
    length_map,
    mean_square,
    mean_square_slope,
)

ERF = np.vectorize(math.erf)

# Written out once more, each in its textbook form.
ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "leaky-relu": lambda z: np.where(z > 0, z, 0.01 * z),
    "tanh": lambda z: (np.exp(z) - np.exp(-z)) / (np.exp(z) + np.exp(-z)),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "gelu": lambda z: z * (1 + ERF(z / math.sqrt(2))) / 2,
    "silu": lambda z: z / (1 + np.exp(-z)),
    "elu": lambda z: np.where(z > 0, z, np.exp(z) - 1),
    "selu": lambda z: 1.0507009873554805 * np.where(z > 0, z, 1.6732632423543772 * (np.exp(z) - 1)),
    "softplus": lambda z: np.log(1 + np.exp(z)),
    "hardtanh": lambda z: np.minimum(np.maximum(z, -1), 1),
    "softsign": lambda z: z / (1 + np.abs(z)),
}

# Decay of the gradient norm per layer of plain networks, 256 wide: PyTorch's default initialization (weight variance
# 1/3 of 1/fan_in, bias variance 1/(3 fan_in)), and Xavier and Kaiming weights without bias, after 300 layers.
PER_LAYER = [
    ("relu", 1 / 3, 0.408), ("tanh", 1 / 3, 0.576), ("sigmoid", 1 / 3, 0.1414), ("gelu", 1 / 3, 0.289),
    ("silu", 1 / 3, 0.289), ("elu", 1 / 3, 0.568), ("selu", 1 / 3, 0.808), ("softplus", 1 / 3, 0.295),
    ("relu", 1, 0.707), ("sigmoid", 1, 0.236), ("gelu", 1, 0.500), ("silu", 1, 0.500), ("elu", 1, 0.995),
    ("selu", 1, 1.035), ("relu", 2, 1.0), ("tanh", 2, 1.051), ("sigmoid", 2, 0.318), ("gelu", 2, 0.707),
    ("silu", 2, 0.707),
]  # fmt: skip

# tanh with bias variance 0.05: weight variance, fixed point q*, chi there.
TANH_PHASES = [
    (1.00, 0.1936, 0.7590), (1.25, 0.2921, 0.8632), (1.50, 0.4180, 0.9386), (1.70, 0.5331, 0.9867),
    (1.76095, 0.5700, 1.0), (2.00, 0.7218, 1.0477), (2.50, 1.064, 1.1335), (3.00, 1.428, 1.2089), (4.00, 2.196, 1.3424),
]  # fmt: skip


def expectation(function, q):
    """E[f(z)], z ~ N(0, q), by a midpoint sum over 24 standard deviations: no node at the kinks."""
    edges = np.linspace(-12, 12, 60_001)
    z = (edges[1:] + edges[:-1]) / 2
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return float(np.sum(function(math.sqrt(q) * z) * density) * (z[1] - z[0]))


@pytest.mark.parametrize("q", [1e-4, 0.3, 1.0, 9.0])
@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_mean_square_is_the_integral(kind, q):
    """E[phi(z)^2] agrees with a fine sum over the density, for every activation that the theory covers."""
    expected = expectation(lambda z: ACTIVATIONS[kind](z) ** 2, q)

    assert mean_square(kind, q) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("q", [1e-4, 0.3, 1.0, 9.0])
@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_mean_square_slope_is_the_integral_of_the_difference_quotient(kind, q):
    """E[phi'(z)^2] agrees with a fine sum over central differences of phi."""
    step = 1e-6
    slope = lambda z: (ACTIVATIONS[kind](z + step) - ACTIVATIONS[kind](z - step)) / (2 * step)  # noqa: E731

    # A jump of the slope inside one cell of 4e-4 standard deviations costs at most its share of the density; where
    # |phi'| jumps at 1 (hardtanh) the grid of the quadrature, 5e-3, shows: 0.4 * 5e-3 at worst.
    assert mean_square_slope(kind, q) == pytest.approx(expectation(lambda z: slope(z) ** 2, q), rel=3e-3)


def test_every_covered_activation_is_tested():
    """The table of textbook forms and the theory cover the same activations."""
    assert set(ACTIVATIONS) == KINDS


@pytest.mark.parametrize("kind, weight_variance, factor", PER_LAYER)
def test_factor_per_layer(kind, weight_variance, factor):
    """The gradient factor at the fixed point equals the tabulated one to its last digit."""
    bias = 1 / (3 * 256) if weight_variance < 0.5 else 0.0
    q = fixed_point(kind, weight_variance=weight_variance, bias_variance=bias, layers=300)

    # Tabulated to three digits; the slow power-law approach of tanh-like networks to q = 0 costs 0.2 %.
    assert gradient_factor(kind, q, weight_variance=weight_variance) == pytest.approx(factor, rel=3e-3)


@pytest.mark.parametrize("weight_variance, q, slope", TANH_PHASES)
def test_phases_of_tanh(weight_variance, q, slope):
    """Fixed point and chi of tanh networks agree with the published phase diagram (Schoenholz et al. 2017)."""
    settled = fixed_point("tanh", weight_variance=weight_variance, bias_variance=0.05)

    assert settled == pytest.approx(q, rel=5e-4)
    assert chi("tanh", settled, weight_variance=weight_variance) == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("kind, weights, biases", [("gelu", 1.98305826, 0.17292239), ("silu", 1.98800468, 0.55514317)])
def test_critical_points_of_gelu_and_silu(kind, weights, biases):
    """At the critical point of Roberts, Yaida & Hanin (2022) chi is 1 and the norm is stable in both directions."""
    q = {"gelu": 3.5616, "silu": 14.3202}[kind]
    sideways = (mean_square(kind, q * 1.0001) - mean_square(kind, q * 0.9999)) / (q * 0.0002)

    assert length_map(kind, q, weight_variance=weights, bias_variance=biases) == pytest.approx(q, rel=1e-4)
    assert chi(kind, q, weight_variance=weights) == pytest.approx(1, abs=1e-4)
    assert weights * sideways == pytest.approx(1, abs=1e-3)


def test_factor_of_a_random_network():
    """In a random 512-wide tanh network of 30 layers the gradient norm falls as the theory says, within 3 %."""
    rng = np.random.default_rng(0)
    width, depth, variance = 512, 30, 1.5
    weights = [rng.normal(0, math.sqrt(variance / width), (width, width)) for _ in range(depth)]
    biases = rng.normal(0, math.sqrt(0.05), (depth, width))
    h, slopes = rng.normal(size=(width, 64)), []
    for w, b in zip(weights, biases, strict=True):
        z = w @ h + b[:, None]
        h = np.tanh(z)
        slopes.append(1 - h**2)
    signal = rng.normal(size=h.shape)
    norms = []
    for w, slope in zip(weights[::-1], slopes[::-1], strict=True):
        signal = w.T @ (slope * signal)
        norms.append(np.linalg.norm(signal))
    # One network and 64 inputs: the norm of layer 20 against layer 5, per layer.
    measured = (norms[19] / norms[4]) ** (1 / 15)
    q = fixed_point("tanh", weight_variance=variance, bias_variance=0.05)

    assert measured == pytest.approx(gradient_factor("tanh", q, weight_variance=variance), rel=0.03)


@given(st.sampled_from(sorted(KINDS)), st.floats(1e-3, 30))
def test_critical_weights_keep_the_gradient(kind, q):
    """With the critical weight variance chi is 1 at that q, and the standard deviation is its root over fan-in."""
    variance = critical_weight_variance(kind, q)

    assert chi(kind, q, weight_variance=variance) == pytest.approx(1)
    assert critical_std(kind, 50, q) == pytest.approx(math.sqrt(variance / 50))


def test_critical_weights_of_relu_are_those_of_he():
    """For ReLU the critical standard deviation is sqrt(2 / fan_in)."""
    assert critical_std("relu", 128) == pytest.approx(math.sqrt(2 / 128))


@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_largest_slope(kind):
    """The largest slope is that of the steepest difference quotient on a fine grid."""
    z = np.linspace(-8, 8, 160_001) + 3e-6
    steepest = np.max(np.abs(np.diff(ACTIVATIONS[kind](z)) / np.diff(z)))

    assert largest_slope(kind) == pytest.approx(steepest, rel=1e-3)


@pytest.mark.parametrize(
    "batch, factor", [(4, 3.08), (8, 1.788), (16, 1.590), (32, 1.522), (64, 1.493), (128, 1.480), (256, 1.473)]
)
def test_batch_norm_factor(batch, factor):
    """The factor of batch-normalized ReLU networks equals that of theorem 8 of Yang et al. (2019)."""
    assert batch_norm_factor(batch) == pytest.approx(factor, rel=2e-3)


def test_batch_norm_factor_of_large_batches():
    """For large batches the factor is pi / (pi - 1)."""
    assert batch_norm_factor(10**6) == pytest.approx(math.pi / (math.pi - 1), rel=1e-5)


def test_what_is_not_covered_is_refused():
    """An unknown activation and a batch too small for the theorem are refused with a sentence."""
    with pytest.raises(ValueError, match="'swish' is not known"):
        mean_square("swish", 1.0)
    with pytest.raises(ValueError, match="'swish' is not known"):
        mean_square_slope("swish", 1.0)
    with pytest.raises(ValueError, match="at least 4"):
        batch_norm_factor(3)


def test_runaway_variance_is_infinite():
    """The length map of a network whose norms grow without bound has no fixed point."""
    assert fixed_point("relu", weight_variance=3.0) == math.inf
