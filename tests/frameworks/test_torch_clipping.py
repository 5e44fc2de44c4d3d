"""Clipping in place, against torch's own functions, numpy and float64 one-liners."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from isograd.frameworks.torch import _clipping as clipping

ENTRIES = st.floats(-1e6, 1e6, width=32).filter(lambda value: value == 0 or abs(value) > 1e-6)
GRADIENTS = st.lists(st.lists(ENTRIES, min_size=1, max_size=12), min_size=1, max_size=4)
LIMITS = st.floats(1e-3, 1e3)


def with_gradients(*gradients):
    found = []
    for values in gradients:
        parameter = nn.Parameter(torch.ones_like(torch.as_tensor(values, dtype=torch.float32)))
        parameter.grad = torch.as_tensor(values, dtype=torch.float32).clone()
        found.append(parameter)
    return found


def norms_of(parameters):
    return [float(torch.linalg.vector_norm(p.grad.double())) for p in parameters]


CLIPS = {
    "value": clipping.clip_value,
    "norm": clipping.clip_norm,
    "tensor-norm": clipping.clip_tensor_norms,
    "adaptive": clipping.clip_adaptively,
}


@given(gradients=GRADIENTS, limit=LIMITS)
def test_global_norm_is_at_most_the_limit_and_the_direction_is_kept(gradients, limit):
    """Clipping by norm gives g min(1, limit / |g|) over all tensors together."""
    parameters = with_gradients(*gradients)
    flat = np.concatenate([np.asarray(g, dtype=np.float64) for g in gradients])
    clipping.clip_norm(parameters, limit)
    expected = flat * min(1.0, limit / (np.linalg.norm(flat) + 1e-6))  # torch adds 1e-6
    found = np.concatenate([p.grad.double().numpy() for p in parameters])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-30)


@given(gradients=GRADIENTS, limit=LIMITS)
def test_each_tensor_is_clipped_on_its_own(gradients, limit):
    """Tensor-wise clipping is torch's norm clipping of every tensor alone."""
    parameters, alone = with_gradients(*gradients), with_gradients(*gradients)
    clipping.clip_tensor_norms(parameters, limit)
    for parameter, twin in zip(parameters, alone, strict=True):
        nn.utils.clip_grad_norm_([twin], limit)
        assert torch.equal(twin.grad, parameter.grad)


@given(gradients=GRADIENTS, limit=LIMITS)
def test_values_end_within_the_limit(gradients, limit):
    """Clipping by value is numpy's clip."""
    parameters = with_gradients(*gradients)
    clipping.clip_value(parameters, limit)
    for parameter, values in zip(parameters, gradients, strict=True):
        np.testing.assert_allclose(parameter.grad.numpy(), np.clip(np.float32(values), -limit, limit), rtol=1e-6)


@pytest.mark.parametrize("method", CLIPS)
@given(gradients=GRADIENTS)
def test_inactive_clipping_changes_no_bit(method, gradients):
    """A limit beyond every gradient leaves every bit alone."""
    parameters = with_gradients(*gradients)
    CLIPS[method](parameters, 1e9)
    for parameter, values in zip(parameters, gradients, strict=True):
        assert torch.equal(torch.tensor(values), parameter.grad)


@pytest.mark.parametrize("method", CLIPS)
@given(gradients=GRADIENTS, limit=LIMITS)
def test_clipping_twice_is_clipping_once(method, gradients, limit):
    """What has been clipped is within the limit: once more changes nothing beyond the 1e-6 that torch adds to norms."""
    once, twice = with_gradients(*gradients), with_gradients(*gradients)
    CLIPS[method](once, limit)
    CLIPS[method](twice, limit)
    CLIPS[method](twice, limit)
    for first, second in zip(once, twice, strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=2e-6 / limit + 1e-5, atol=1e-30)


@pytest.mark.parametrize("method", CLIPS)
def test_huge_finite_gradients_stay_finite(method):
    """Entries whose squares overflow keep their direction; torch alone would return zeros."""
    (parameter,) = with_gradients([[3e30, 4e30], [0.0, 0.0]])
    CLIPS[method]([parameter], 1.0)
    assert torch.isfinite(parameter.grad).all()
    assert parameter.grad[0, 0] > 0
    if method != "value":
        assert 0.75 == pytest.approx(float(parameter.grad[0, 0] / parameter.grad[0, 1]), rel=1e-5)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (4, 3, 2), (4, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_adaptive_clipping_is_the_papers_formula(shape, scale):
    """g_i <- limit max(|W_i|, 1e-3) / |g_i| g_i per unit where |g_i| / max(|W_i|, 1e-3) > limit (Brock et al.)."""
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(torch.randn(shape, generator=generator) * scale)
    parameter.grad = torch.randn(shape, generator=generator)
    weights, gradient = parameter.detach().double().numpy(), parameter.grad.double().numpy()
    units = range(shape[0]) if len(shape) > 1 else [slice(None)]
    for unit in units:
        allowed = 0.01 * max(np.linalg.norm(weights[unit]), 1e-3)
        if np.linalg.norm(gradient[unit]) > allowed:
            gradient[unit] *= allowed / np.linalg.norm(gradient[unit])
    clipping.clip_adaptively([parameter], 0.01)
    np.testing.assert_allclose(parameter.grad.numpy(), gradient, rtol=1e-5)


@given(norms=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60), percentile=st.floats(0, 100))
def test_the_limit_by_percentile_is_numpys(norms, percentile):
    """AutoClip's limit is numpy's percentile of all norms so far, the current one included."""
    clip = clipping.PercentileClip(percentile)
    for index, norm in enumerate(norms):
        limit = clip.limit_after(norm)
        assert np.percentile(norms[: index + 1], percentile) == pytest.approx(limit, rel=1e-9)


def zclip_in_float64(norms, limit=2.5):
    """The paper's recursion, written out: (limit, mean, variance) after each norm."""
    first, rows = norms[:25], []
    mean, variance = float(np.mean(first)), float(np.var(first))
    for norm in norms[25:]:
        z = (norm - mean) / (math.sqrt(variance) + 1e-6)
        clipped = mean + math.sqrt(variance) * limit**2 / z if z > limit else norm
        mean = 0.97 * mean + 0.03 * clipped
        variance = 0.97 * variance + 0.03 * (clipped - mean) ** 2
        rows.append((clipped, mean, variance))
    return rows


def test_z_score_clipping_is_the_papers_recursion():
    """ZClip: 25 norms of warm-up, then mean and variance move with the clipped norms."""
    generator = np.random.default_rng(0)
    norms = [*generator.lognormal(size=120), 50.0, *generator.lognormal(size=20), 500.0]
    clip = clipping.ZScoreClip(2.5)
    limits = [clip.limit_after(norm) for norm in norms]
    assert all(map(math.isinf, limits[:25]))
    expected = zclip_in_float64(norms)
    for norm, limit, (clipped, _, _) in zip(norms[25:], limits[25:], expected, strict=True):
        assert clipped == pytest.approx(min(norm, limit))
    assert expected[-1][1:] == pytest.approx((clip.mean, clip.variance))
    assert limits[-1] < 500.0


@given(gradients=GRADIENTS, percentile=st.floats(0, 100))
def test_clipping_by_history_keeps_the_direction_and_never_lengthens(gradients, percentile):
    """Whatever the history, the gradient is multiplied with one factor of at most 1."""
    history = clipping.PercentileClip(percentile)
    history.limit_after(1.0)
    parameters = with_gradients(*gradients)
    clipping.clip_by_history(parameters, history)
    before = np.concatenate([np.asarray(g) for g in gradients])
    after = np.concatenate([p.grad.double().numpy() for p in parameters])
    length = np.linalg.norm(before)
    factor = np.linalg.norm(after) / length if length else 1.0
    assert factor <= 1 + 1e-6
    np.testing.assert_allclose(after, before * factor, rtol=1e-4, atol=1e-12)
