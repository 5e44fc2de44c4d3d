"""How each statistic is computed inside a compiled step: no state, no host.

Sums run in float32, or float64 for float64 arrays. NaN and Inf propagate: whoever reads the row turns them into counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

CHEAP = ("grad_norm", "grad_max", "grad_nonfinite")
"""Read of every gradient at every step, [3, P] in this order."""

DEEP = ("grad_zero_fraction", "weight_norm", "weight_nonfinite", "update_norm", "unit_spread")
"""Read at deep steps, [5, P] in this order."""

barrier: Callable[[Any], Any] = lax.optimization_barrier
"""What it returns is computed apart: XLA does not fuse it into the optimizer's update, which it would no longer
vectorize."""

_RUNS, _RUN = 64, 256
"""Entries of a gradient in which the largest is looked for: evenly spaced runs, so that few cache lines are touched."""

_UNITS, _CONNECTIONS = 64, 256
"""Units of a weight that are compared, and how many connections of each."""


def cheap(gradients: Sequence[Any]) -> Array:
    """`CHEAP` of each gradient, [3, P].

    One pass over the gradients, for their norms, and a sample for the largest entry. Where a norm is 0 or not finite,
    which a non-finite entry and an overflow of the squares make it, a second pass finds the largest of all entries and
    counts those that are not finite.
    """
    if not gradients:
        return jnp.zeros((len(CHEAP), 0), jnp.float32)
    behind = list(map(_array, barrier(list(gradients))))
    norms = _row(_norm, behind)
    some, is_fine = [_sample(gradient) for gradient in behind], jnp.all(jnp.isfinite(norms) & (norms > 0))
    peaks, counts = lax.cond(
        is_fine,
        lambda *_: (_row(_largest, some), jnp.zeros_like(norms)),
        lambda *whole: (_row(_largest, whole), _row(_num_nonfinite, whole)),
        *behind,
    )
    return jnp.stack([norms, peaks, counts])


def deep(gradients: Sequence[Any], weights: Sequence[Any], updates: Sequence[Any]) -> tuple[Array, Array]:
    """(`CHEAP`, `DEEP`) of each tensor, [3, P] and [5, P], all entries counted.

    `weights` and `updates` are as long as `gradients`, or empty where they are not known: NaN.
    """
    if not gradients:
        return cheap(gradients), jnp.zeros((len(DEEP), 0), jnp.float32)
    g, w, u = barrier((list(gradients), list(weights), list(updates)))
    g, w, u = list(map(_array, g)), list(map(_array, w)), list(map(_array, u))
    unknown = jnp.full(len(g), jnp.nan, jnp.float32)
    of_gradients = jnp.stack([_row(_norm, g), _row(_largest, g), _row(_num_nonfinite, g)])
    of_weights = [_row(f, w) if w else unknown for f in (_norm, _num_nonfinite)]
    spread = _row(_unit_spread, w) if w else unknown
    return of_gradients, jnp.stack([_row(_zero_fraction, g), *of_weights, _row(_norm, u) if u else unknown, spread])


def _row(function: Callable[[Array], Array], arrays: Sequence[Array]) -> Array:
    return jnp.stack([function(array).astype(jnp.float32) for array in arrays])


def _array(leaf: Any) -> Array:
    """A real array in the type that sums run in; complex entries as pairs."""
    array = jnp.asarray(leaf)
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag])
    return array


def _wide(array: Array) -> Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _norm(array: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(_wide(array))))


def _largest(array: Array) -> Array:
    return jnp.max(jnp.abs(array))


def _num_nonfinite(array: Array) -> Array:
    return jnp.sum(~jnp.isfinite(array))


def _zero_fraction(array: Array) -> Array:
    return jnp.mean(array == 0)


def _sample(array: Array) -> Array:
    flat = array.reshape(-1)
    if flat.size <= _RUNS * _RUN:
        return flat
    spacing = flat.size // _RUNS
    return flat[: _RUNS * spacing].reshape(_RUNS, spacing)[:, :_RUN]


def _unit_spread(weight: Array) -> Array:
    """RMS of a weight [..., units] about the mean over its units, over its RMS; NaN with fewer than two axes or units.

    Sums are of differences from the first unit: units that are identical give exactly 0.
    """
    if weight.ndim < 2 or weight.shape[-1] < 2:
        return jnp.full((), jnp.nan)
    stride = -(-weight.shape[-1] // _UNITS)
    some = _wide(weight.reshape(-1, weight.shape[-1])[:_CONNECTIONS, ::stride])
    apart = some - some[:, :1]
    about_mean = jnp.sum(jnp.square(apart)) - jnp.sum(jnp.square(jnp.sum(apart, axis=1))) / apart.shape[1]
    return jnp.sqrt(jnp.maximum(about_mean, 0) / jnp.sum(jnp.square(some)))


copies: Callable[[Any], Any] = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
"""Copies of arrays in buffers of their own: the next step may be given the originals' memory."""
