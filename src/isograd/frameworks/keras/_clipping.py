"""Ways to clip gradients inside a compiled step. Gradients with NaN or Inf pass: clipping would spread them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from isograd import _changes
from isograd._changes import CannotApply
from isograd.frameworks.keras._stepping import GradientChange


def clip_of(change: _changes.ClipGradients, exempt: frozenset[str]) -> GradientChange:
    """The clipping of a change. `exempt`: paths of variables that adaptive clipping leaves alone."""
    limit = change.limit
    if change.method == "value":
        return lambda grads, variables: clip_value(grads, limit)
    if change.method == "norm":
        return lambda grads, variables: clip_norm(grads, limit)
    if change.method == "tensor-norm":
        return lambda grads, variables: [g for grad in grads for g in clip_norm([grad], limit)]
    if change.method == "adaptive":
        return lambda grads, variables: clip_adaptively(grads, variables, limit, exempt)
    raise CannotApply("A compiled step keeps no history of gradient norms: clip by a norm or by a value instead.")


def clip_value(grads: Sequence[Any], limit: float) -> list[Any]:
    """Every entry into [-limit, limit]; this changes the direction."""
    dense = [_dense(grad) for grad in grads]
    finite = ops.all(ops.stack([ops.all(ops.isfinite(grad)) for grad in dense]))
    return [ops.where(finite, ops.clip(grad, -limit, limit), grad) for grad in dense]


def clip_norm(grads: Sequence[Any], limit: float) -> list[Any]:
    """All gradients together to an L2 norm of at most `limit` (Pascanu et al. 2013), in units of the largest entry: no
    sum of squares overflows.
    """
    wide = [ops.cast(_dense(grad), "float32") for grad in grads]
    peak = ops.max(ops.stack([ops.max(ops.abs(grad)) for grad in wide]))
    unit = ops.where(ops.logical_and(peak > 0, ops.isfinite(peak)), peak, 1.0)
    norm = ops.sqrt(ops.sum(ops.stack([ops.sum(ops.square(grad / unit)) for grad in wide])))
    too_long = ops.logical_and(ops.isfinite(peak), norm > limit / unit)
    factor = ops.where(too_long, limit / unit / ops.where(too_long, norm, 1.0), 1.0)
    return [_times(grad, factor) for grad in grads]


def clip_adaptively(
    grads: Sequence[Any], variables: Sequence[Any], limit: float, exempt: frozenset[str], *, floor: float = 1e-3
) -> list[Any]:
    """Each unit's gradient to at most `limit` times the norm of its weights, taken as at least `floor`: adaptive
    gradient clipping, Brock et al. 2021, arXiv:2102.06171, equation 3. A unit is a column of a kernel, whose last axis
    is that of the outputs, or a whole vector.
    """
    found = []
    for grad, variable in zip(grads, variables, strict=True):
        if is_sparse(grad) or variable.path in exempt:
            found.append(grad)
            continue
        lengths, allowed = _unit_norms(grad), limit * ops.maximum(_unit_norms(variable), floor)
        too_long = ops.logical_and(ops.isfinite(lengths), lengths > allowed)
        factor = ops.where(too_long, allowed / ops.where(too_long, lengths, 1.0), 1.0)
        found.append(grad * ops.cast(factor, grad.dtype))
    return found


def _unit_norms(tensor: Any) -> Any:
    """L2 norm over all axes but the last, shaped to broadcast; of everything where there is one axis only."""
    wide = ops.cast(ops.convert_to_tensor(tensor), "float32")
    axes = tuple(range(len(wide.shape) - 1)) or None
    return ops.sqrt(ops.sum(ops.square(wide), axis=axes, keepdims=True))


def is_sparse(grad: Any) -> bool:
    """Whether it is what TensorFlow makes of an embedding's gradient."""
    return keras.backend.backend() == "tensorflow" and type(grad).__name__ == "IndexedSlices"


def _dense(grad: Any) -> Any:
    if not is_sparse(grad):
        return grad
    import tensorflow as tf

    return tf.convert_to_tensor(grad)  # adds up the entries that share a row


def _times(grad: Any, factor: Any) -> Any:
    if not is_sparse(grad):
        return grad * ops.cast(factor, grad.dtype)
    import tensorflow as tf

    return tf.IndexedSlices(grad.values * ops.cast(factor, grad.values.dtype), grad.indices, grad.dense_shape)
