"""How each statistic is computed inside a step of Keras: on any backend, traced or not, without a host synchronization.

Every function takes the backend's tensors and returns float32 tensors of the same backend. Sums run in float32. NaN and
Inf propagate: whoever reads them turns them into counts. What `isograd.frameworks.torch._kernels` samples to spare the
host is read in whole here, where a compiler fuses it: the same statistics, exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from keras import ops

Tensor = Any  # of the backend: a symbolic or eager tf.Tensor, a jax.Array or tracer, a torch.Tensor

SAMPLE = 16384
"""Entries of a gradient whose largest one is looked for between deep steps: 64 evenly spaced runs of 256."""

_RUNS = 64

ROWS, COLUMNS = 256, 64
"""Rows of a batch that leave the step as they are, and how many entries of each."""

ALIKE_ROWS, ALIKE_COLUMNS = 64, 256
"""Rows that similarities compare, and how many entries of each."""

STEEPEST = {"sigmoid": 0.25, "tanh": 1.0, "hardtanh": 1.0, "softsign": 1.0}
"""Largest slope of the bounded activations: the only ones that saturate on both sides."""

FLAT = 0.05
"""Share of the largest slope below which a bounded activation counts as saturated (see `saturation`)."""


def wide(tensor: Tensor) -> Tensor:
    """Any real tensor as float32, without a gradient of its own."""
    return ops.cast(ops.stop_gradient(tensor) if _is_float(tensor) else tensor, "float32")


def _is_float(tensor: Tensor) -> bool:
    return "float" in str(ops.dtype(tensor) if hasattr(ops, "dtype") else tensor.dtype)


def size(tensor: Tensor) -> Tensor:
    """Number of entries, also where an axis is not known before the step runs."""
    shape = ops.shape(tensor)
    if all(isinstance(extent, int) for extent in shape):
        return ops.convert_to_tensor(float(math.prod(shape)), dtype="float32")
    return ops.prod(ops.stack([ops.cast(extent, "float32") for extent in shape]))


def square_sum(values: Tensor) -> Tensor:
    """Sum of squares of float32 values."""
    return ops.sum(ops.square(values))


def count(truths: Tensor) -> Tensor:
    """How many entries of a Boolean tensor are True."""
    return ops.sum(ops.cast(truths, "float32"))


def nonfinite(values: Tensor) -> Tensor:
    """How many entries are NaN or Inf."""
    return count(ops.logical_not(ops.isfinite(values)))


def largest(values: Tensor, *, sampled: bool) -> Tensor:
    """Largest absolute entry; of a sample of `SAMPLE` entries where `sampled`, a lower bound then."""
    # Of some gradients (those of an einsum on TensorFlow) no shape is known before the step runs.
    entries = 0 if None in values.shape else math.prod(values.shape)
    if sampled and entries > SAMPLE:
        spacing = entries // _RUNS
        values = ops.reshape(ops.reshape(values, (-1,))[: spacing * _RUNS], (_RUNS, spacing))[:, : SAMPLE // _RUNS]
    return ops.max(ops.abs(values))


# ---- what a layer returned ------------------------------------------------------------------------------------------


def values(tensor: Tensor) -> dict[str, Tensor]:
    """The statistics of a value as such: names as in `Call` of the observer."""
    plain = wide(tensor)
    return {
        "size": size(plain),
        "squares": square_sum(plain),
        "sum": ops.sum(plain),
        "low": ops.min(plain),
        "high": ops.max(plain),
        "zeros": count(ops.equal(plain, 0.0)),
        "nonfinite": nonfinite(plain),
    }


def signal(gradient: Tensor) -> Tensor:
    """[4]: sum of squares, largest absolute entry, zeros, non-finite entries of a gradient."""
    plain = wide(gradient)
    return ops.stack([square_sum(plain), ops.max(ops.abs(plain)), count(ops.equal(plain, 0.0)), nonfinite(plain)])


SIGNAL = ("signal_squares", "signal_max", "signal_zeros", "signal_nonfinite")
"""What the entries of `signal` are called."""


def signal_of_times(gradient: Tensor, axis: int) -> Tensor:
    """[times]: sum of squares of a gradient at each time step, the steps standing along `axis`."""
    plain = wide(gradient)
    others = [dim for dim in range(len(plain.shape)) if dim != axis]
    return ops.sum(ops.square(plain), axis=others)


def similarity(tensor: Tensor, axis: int) -> dict[str, Tensor]:
    """How much alike some rows are: squared length of the sum of their directions, and how many are not all zero."""
    features_last = ops.moveaxis(wide(tensor), axis, -1)[..., :ALIKE_COLUMNS]
    flat = ops.reshape(features_last, (-1, features_last.shape[-1]))
    chosen = ops.take(flat, places(ops.shape(flat)[0], ALIKE_ROWS), axis=0)
    lengths = ops.sqrt(ops.sum(ops.square(chosen), axis=1, keepdims=True))
    total = ops.sum(chosen / ops.maximum(lengths, 1e-30), axis=0)
    return {"rows_squared": square_sum(total), "rows": count(ops.greater(lengths, 0.0))}


def places(available: Any, limit: int) -> Tensor:
    """Indices of at most `limit` evenly spaced rows; of exactly `limit`, some of them repeated, where the number of
    rows is not known before the step runs: every shape is fixed then.
    """
    if isinstance(available, int):
        return ops.arange(0, available, -(-available // limit) if available else 1, dtype="int32")
    return ops.cast(ops.arange(limit, dtype="int32") * ops.cast(available, "int32") // limit, "int32")


def sample(tensor: Tensor) -> Tensor:
    """[at most ROWS, at most COLUMNS]: entries of a batch as they are, rows being its first axis."""
    plain = wide(tensor)
    width = math.prod(plain.shape[1:])
    rows = ops.take(plain, places(ops.shape(plain)[0], ROWS), axis=0)
    return ops.reshape(rows, (-1, width))[:, :: -(-width // COLUMNS)]


def batch_gap(tensor: Tensor, mean: Tensor, variance: Tensor, axis: int, epsilon: float) -> Tensor:
    """RMS over channels of (batch mean - running mean) / sqrt(running variance + epsilon), before the batch."""
    plain = wide(tensor)
    others = [dim for dim in range(len(plain.shape)) if dim != axis % len(plain.shape)]
    gap = ops.mean(plain, axis=others) - wide(mean)
    return ops.sqrt(ops.mean(ops.square(gap) / (wide(variance) + epsilon)))


# ---- activations ----------------------------------------------------------------------------------------------------


def slope(kind: str, out: Tensor, x: Tensor, constants: Mapping[str, float]) -> Tensor | None:
    """Elementwise derivative of an activation; None for one that this module does not know.

    `constants`: `negative_slope` (leaky-relu), `alpha` and `scale` (elu, selu), `low` and `high` (hardtanh).
    """
    if kind == "sigmoid":
        return out * (1 - out)
    if kind == "tanh":
        return 1 - ops.square(out)
    if kind == "relu":
        return ops.cast(out > 0, "float32")
    if kind == "leaky-relu":
        return ops.where(x > 0, 1.0, constants.get("negative_slope", 0.2))
    if kind in ("elu", "selu"):
        scale, alpha = constants.get("scale", 1.0), constants.get("alpha", 1.0)
        return ops.where(out > 0, scale, out + scale * alpha)
    if kind == "softplus":
        return 1 - ops.exp(-out)
    if kind == "softsign":
        return ops.square(1 - ops.abs(out))
    if kind == "hardtanh":
        inside = ops.logical_and(out > constants.get("low", -1.0), out < constants.get("high", 1.0))
        return ops.cast(inside, "float32")
    if kind == "silu":
        gate = ops.sigmoid(x)
        return gate * (1 + x * (1 - gate))
    if kind == "gelu":
        density = ops.exp(-ops.square(x) / 2) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + ops.erf(x / math.sqrt(2))) + x * density
    return None


def activation(kind: str, out: Tensor, x: Tensor, axis: int, constants: Mapping[str, float]) -> dict[str, Tensor]:
    """How an activation works: dead units, saturated entries, squared slopes, as far as the notions apply."""
    y, before = wide(out), wide(x)
    found: dict[str, Tensor] = {}
    steep = slope(kind, y, before, constants)
    if steep is not None:
        found["slope_squares"] = square_sum(steep)
        if kind in STEEPEST:
            found["saturated"] = count(steep < FLAT * STEEPEST[kind])
    if kind in ("relu", "hardtanh"):
        active = ops.not_equal(y, 0.0) if kind == "relu" else steep > 0  # type: ignore[operator]
        others = [dim for dim in range(len(y.shape)) if dim != axis % len(y.shape)]
        alive = ops.any(active, axis=others) if others else active
        found["dead"] = 1 - ops.mean(ops.cast(alive, "float32"))
    return found


# ---- parameters -----------------------------------------------------------------------------------------------------


def unit_spread(weight: Tensor) -> Tensor:
    """RMS of a weight [..., units] about the mean over its units, over its RMS; of at most 64 units, 256 entries each.

    Sums are of differences from the first unit: units that are identical give exactly 0.
    """
    units = weight.shape[-1]
    rows = ops.transpose(ops.reshape(wide(weight), (-1, units))[:ALIKE_COLUMNS, :: -(-units // ALIKE_ROWS)])
    apart = rows - rows[:1]
    about_mean = square_sum(apart) - square_sum(ops.sum(apart, axis=0)) / rows.shape[0]
    return ops.sqrt(ops.maximum(about_mean, 0.0) / square_sum(rows))


def packed(pieces: Sequence[Tensor]) -> Tensor:
    """[total]: pieces of any shape behind each other, as float32."""
    flat = [ops.reshape(ops.cast(piece, "float32"), (-1,)) for piece in pieces]
    return ops.concatenate(flat) if flat else ops.zeros((0,), dtype="float32")
