"""How each statistic is computed on PyTorch tensors: no hooks, no state, no host synchronization.

Every function returns zero-dimensional tensors on the device of its argument; the caller packs them into one row and
reads that row back once. Sums run in float32, or float64 for float64 tensors. NaN and Inf propagate: whoever reads the
row turns them into counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

PARAMETER_SAMPLE = 16384
"""Entries of a parameter that estimates look at: 64 evenly spaced runs of 256, so that few cache lines are touched."""

ACTIVATION_SAMPLE = 16384
"""Entries of an activation that estimates look at. Small enough for torch to stay on one thread (its grain is 32768
entries): for so little work, waking others costs more than it gives."""

UNIT_ENTRIES = 1 << 18
"""Largest activation whose every row is examined for dead units; larger ones are strided along the batch."""

ROWS = 256
"""Rows that row sums and column scales look at."""

_RUNS, _RUN = 64, PARAMETER_SAMPLE // 64


_REDUCIBLE = frozenset(
    {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
)
"""Dtypes that torch can reduce everywhere: not bool, 8-bit floats and wide unsigned integers."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over `dtype` are accumulated in: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def real(tensor: Tensor) -> Tensor:
    """`tensor` as plain real dense values: complex as pairs, sparse as its coalesced values, odd dtypes as float32."""
    plain = tensor.detach()
    if plain.layout == torch.sparse_coo:
        plain = plain.coalesce()
    if plain.layout != torch.strided:
        plain = plain.values()
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj())
    return plain if plain.dtype in _REDUCIBLE else plain.dequantize() if plain.is_quantized else plain.float()


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """L2 norm of each real dense tensor; one multi-tensor launch where all can share it."""
    if not tensors:
        return []
    if any(t.dtype == torch.float64 for t in tensors):
        return [torch.linalg.vector_norm(t, 2, dtype=wide(t.dtype)).float() for t in tensors]
    return list(torch._foreach_norm(list(tensors), 2, dtype=torch.float32))


def extremes(tensors: Sequence[Tensor]) -> list[float]:
    """Largest absolute entry of each non-empty real dense tensor on the CPU, on the host at once; NaN if any is NaN."""
    pairs = [torch.aminmax(tensor) for tensor in tensors]
    lows = torch.stack([low for low, _ in pairs]).tolist()
    highs = torch.stack([high for _, high in pairs]).tolist()
    return [high if high > -low or high != high else -low for low, high in zip(lows, highs, strict=True)]


def largest(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Largest absolute entry of each non-empty real dense tensor.

    On CPU `aminmax` is 14 times faster than the infinity norm; on accelerators the multi-tensor norm is one launch.
    """
    if not tensors:
        return []
    if tensors[0].device.type == "cpu":
        return [torch.maximum(high, low.neg()).float() for low, high in map(torch.aminmax, tensors)]
    return [peak.float() for peak in torch._foreach_norm(list(tensors), math.inf)]


def num_nonfinite(tensor: Tensor) -> Tensor:
    """How many entries are NaN or Inf."""
    return torch.isfinite(tensor).logical_not().sum().float()


def parameter_sample(tensor: Tensor) -> Tensor:
    """A view (a copy when not contiguous) of at most `PARAMETER_SAMPLE` entries in evenly spaced runs."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= PARAMETER_SAMPLE:
        return flat
    step = flat.stride(0)  # 1, except in a column of a matrix (its width) or an expanded scalar (0)
    return flat.as_strided((_RUNS, _RUN), (flat.numel() // _RUNS * step, step), flat.storage_offset())


def activation_sample(tensor: Tensor) -> Tensor:
    """A contiguous copy of at most `ACTIVATION_SAMPLE` entries: `_RUNS` runs in the order of memory, or all of them.

    Runs touch few cache lines; each begins where the one before it ended in the innermost axis, so that together they
    visit every feature.
    """
    ordered = in_memory_order(tensor.detach())
    flat = ordered.reshape(-1)
    if flat.numel() <= ACTIVATION_SAMPLE:
        return flat
    run = ACTIVATION_SAMPLE // _RUNS
    spacing, features = (flat.numel() - run) // (_RUNS - 1), ordered.shape[-1]
    if run < features <= spacing - run:
        spacing = (spacing - run) // features * features + run
    elif run < features <= spacing:  # rows too close for that: begin each run a little before the one of the row above
        spacing = features - -(-(features - run) // (_RUNS - 1))
    step = flat.stride(0)
    return flat.as_strided((_RUNS, run), (spacing * step, step), flat.storage_offset()).reshape(-1)


def in_memory_order(tensor: Tensor) -> Tensor:
    """A view whose axes are ordered so that a transposed tensor can be flattened without a copy."""
    if tensor.is_contiguous():
        return tensor
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))


def _stride(count: int, limit: int, period: int) -> int:
    """The smallest stride that leaves at most `limit` of `count` and shares no factor with `period`."""
    stride = -(-count // limit) if count else 1
    while stride > 1 and math.gcd(stride, period) != 1:
        stride += 1
    return stride


def zero_fraction(sample: Tensor) -> Tensor:
    """Share of exactly zero entries of an already sampled tensor."""
    return 1 - torch.count_nonzero(sample) / sample.numel()


def norm(tensor: Tensor) -> Tensor:
    """L2 norm of one real dense tensor, all entries."""
    if not tensor.is_floating_point():
        tensor = tensor.float()
    length: Tensor = torch.linalg.vector_norm(tensor, 2, dtype=wide(tensor.dtype))
    return length.float()


def spread(values: Tensor) -> list[Tensor]:
    """[mean, smallest, largest] of the entries given."""
    low, high = torch.aminmax(values)
    mean = values.mean(dtype=wide(values.dtype) if values.is_floating_point() else torch.float64)
    return [mean.float(), low.float(), high.float()]


def dead_units(active: Tensor, axis: int) -> Tensor:
    """Share of units (indices along `axis`) at which the Boolean tensor `active` is False for every other index."""
    others = [dim for dim in range(active.dim()) if dim != axis % active.dim()]
    alive = active.any(dim=others) if others else active
    return 1 - alive.float().mean()


def row_sums(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest sum over the last axis, over at most `ROWS` strided rows (fewer where they are long)."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    limit = min(ROWS, max(4, ACTIVATION_SAMPLE // tensor.shape[-1]))
    low, high = torch.aminmax(rows[:: -(-len(rows) // limit)].float().sum(-1))
    return low, high


def column_scale_ratio(tensor: Tensor) -> Tensor:
    """Largest over smallest column RMS of a matrix, zeros left out; 1 for fewer than two columns that have others.

    Without its zeros, a column that is rarely set (a word, a pixel at the border) has the scale of its values.
    """
    rows = tensor.detach()[:: -(-len(tensor) // ROWS)].float()
    scale = rows.square().sum(0).div((rows != 0).sum(0).clamp_min(1)).sqrt()
    present = torch.where(scale > 0, scale, torch.nan)
    smallest = torch.nan_to_num(present, nan=math.inf).min()
    return torch.where(smallest.isfinite(), scale.max() / smallest, 1.0)


# ---- rows: how much alike they are -----------------------------------------------------------------------------------

ALIKE_ROWS, ALIKE_COLUMNS = 64, 256
"""Rows that similarities compare, and how many entries of each: 16384 together."""


def unit_spread(weight: Tensor) -> Tensor:
    """RMS of a weight [units, …] about the mean over its units, over its RMS; at most 64 units, 256 entries of each.

    Sums are of differences from the first unit: units that are identical give exactly 0.
    """
    some = weight.detach()[:: -(-len(weight) // ALIKE_ROWS)]
    rows = some.reshape(len(some), -1)[:, :ALIKE_COLUMNS].to(wide(weight.dtype)).contiguous()
    apart = rows - rows[0]
    total = apart.sum(0)
    about_mean = _squares(apart).sub(_squares(total), alpha=1 / len(rows))
    return about_mean.clamp_min(0).div(_squares(rows)).sqrt().float()


def _squares(values: Tensor) -> Tensor:
    """Sum of squares; for so few entries `dot` is faster than a norm."""
    flat = values.view(-1)
    return torch.dot(flat, flat)


def some_rows(tensor: Tensor, axis: int, limit: int = ALIKE_ROWS, columns: int = ALIKE_COLUMNS) -> Tensor:
    """At most `limit` evenly spaced rows [rows, features]; a row is one index of all axes but `axis`, the features'.

    The spacing is odd and shares no factor with the inner axes, so that nothing that alternates is missed.
    """
    if axis % tensor.dim() == tensor.dim() - 1 and tensor.is_contiguous():
        flat = tensor.detach().view(-1, tensor.shape[-1])
        return flat[:: _stride(len(flat), limit, 2 * math.prod(tensor.shape[1:-1])), :columns]
    features_last = tensor.detach().movedim(axis, -1)[..., :columns]
    return features_last[_places_of_rows(features_last.shape[:-1], limit, tensor.device)]


@lru_cache(maxsize=64)
def _places_of_rows(shape: tuple[int, ...], limit: int, device: torch.device) -> tuple[Tensor, ...]:
    count = math.prod(shape)
    flat = torch.arange(0, count, _stride(count, limit, 2 * math.prod(shape[1:])))
    return tuple(index.to(device) for index in torch.unravel_index(flat, shape))


def directions(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(squared length of the sum of the rows' directions, how many rows are not all zero).

    With n rows the mean cosine between two different ones is (squared length - n) / (n (n - 1)).
    """
    values = rows.double()
    lengths = torch.linalg.vector_norm(values, dim=1)
    total = torch.mv(values.T, lengths.clamp_min(1e-300).reciprocal_())
    return torch.dot(total, total), torch.count_nonzero(lengths)


def num_distinct(tensor: Tensor) -> Tensor:
    """How many of at most `ROWS` evenly spaced entries along the first axis differ; of long rows, some entries each."""
    some = tensor.detach()[:: -(-len(tensor) // ROWS)]
    rows = some.reshape(len(some), -1)
    if not rows.shape[1]:
        return torch.ones(())
    limit = max(1, ACTIVATION_SAMPLE // len(rows))
    marks = _bits(rows[:, :: -(-rows.shape[1] // limit)])
    keys = (marks * _random_factors(marks.shape[1], marks.device)).sum(1).sort().values
    return 1 + torch.count_nonzero(keys.diff())


def _bits(values: Tensor) -> Tensor:
    """Whole numbers that are equal where the values are: those of floating-point numbers, 0 and -0 being one."""
    if not values.is_floating_point():
        return values.long()
    plain = values.to(wide(values.dtype)) + 0.0
    return plain.view(torch.int64 if plain.dtype == torch.float64 else torch.int32).long()


@lru_cache(maxsize=8)
def _random_factors(count: int, device: torch.device) -> Tensor:
    """Factors that turn a row of whole numbers into one by which it is known; drawn without the user's generator."""
    generator = torch.Generator().manual_seed(0)
    return torch.empty(count, dtype=torch.int64).random_(generator=generator).to(device)


def channel_moments(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) of each channel [channels], from `ACTIVATION_SAMPLE` entries at most (but two rows)."""
    channels = tensor.shape[1]
    rows = some_rows(tensor, 1, max(2, ACTIVATION_SAMPLE // channels), channels).to(wide(tensor.dtype))
    return rows.mean(0), rows.var(0, correction=0)


def running_gap(
    mean: Tensor, variance: Tensor, count: int, running: tuple[Tensor, Tensor], momentum: float | Tensor, epsilon: float
) -> Tensor:
    """RMS over channels of (batch mean - running mean) / sqrt(running variance + epsilon), before a batch was taken in.

    `mean`, `variance` (biased): of the batch, [channels]. `running`: mean and variance after the update
    `new = (1 - momentum) * old + momentum * batch`, which is solved for `old`; the batch variance there is unbiased.
    """
    unbiased = variance.double() * (count / max(count - 1, 1))
    kept = 1 - momentum
    before = (running[1].double() - momentum * unbiased) / kept
    gap = (mean.double() - running[0].double()) / kept
    return (gap.square() / (before.clamp_min(0) + epsilon)).mean().sqrt()


# ---- activations: which units are active, and how steep the function is where it works -------------------------

Slope = Callable[[Tensor, "Tensor | None"], "Tensor | None"]


def _sigmoid_slope(out: Tensor, _: Tensor | None) -> Tensor:
    return out * (1 - out)


def _tanh_slope(out: Tensor, _: Tensor | None) -> Tensor:
    return 1 - out.square()


# Torch's own derivatives: unlike `exp` and `erf` they stay on one thread for a sample this small.


def _silu_slope(_: Tensor, x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.ops.aten.silu_backward(torch.ones_like(x), x)


def _gelu_slope(_: Tensor, x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.ops.aten.gelu_backward(torch.ones_like(x), x)


SLOPES: dict[str, Slope] = {
    "sigmoid": _sigmoid_slope,
    "tanh": _tanh_slope,
    "relu": lambda out, _: (out > 0).float(),
    "silu": _silu_slope,
    "gelu": _gelu_slope,
    "softsign": lambda out, _: (1 - out.abs()).square(),
}
"""Derivative of an activation from its output (and its input, where the output does not determine it)."""

STEEPEST = {"sigmoid": 0.25, "tanh": 1.0, "hardtanh": 1.0, "softsign": 1.0}
"""Largest slope of the bounded activations: the only ones that saturate on both sides."""


def slope(kind: str, out: Tensor, x: Tensor | None, parameters: dict[str, float]) -> Tensor | None:
    """Elementwise derivative at a sample, or None for activations that this module does not know.

    `parameters`: `negative_slope` (leaky-relu), `alpha`, `scale` and `input_scale` (elu, selu: scale * alpha *
    (exp(input_scale * x) - 1) below 0), `beta` (softplus), `low` and `high` (hardtanh).
    """
    if kind == "leaky-relu":
        # The input knows better where slopes are learned (PReLU) or random (RReLU).
        below = parameters.get("negative_slope", 0.01) if x is None else torch.where(x < 0, out / x, 1.0)
        return torch.where(out > 0, 1.0, below)
    if kind in ("elu", "selu"):
        scale, alpha = parameters.get("scale", 1.0), parameters.get("alpha", 1.0)
        return torch.where(out > 0, scale, (out + scale * alpha) * parameters.get("input_scale", 1.0))
    if kind == "softplus":
        return 1 - torch.exp(-out * parameters.get("beta", 1.0))
    if kind == "hardtanh":
        return ((out > parameters.get("low", -1.0)) & (out < parameters.get("high", 1.0))).float()
    return SLOPES[kind](out, x) if kind in SLOPES else None


def active(kind: str, out: Tensor, parameters: dict[str, float]) -> Tensor | None:
    """Where the activation's slope is not exactly zero; None for those whose slope is zero at isolated points only."""
    if kind == "relu":
        return out != 0
    if kind == "hardtanh":
        return (out > parameters.get("low", -1.0)) & (out < parameters.get("high", 1.0))
    return None


def activation(
    kind: str, out: Tensor, x: Tensor | None, axis: int, parameters: dict[str, float]
) -> list[Tensor | None]:
    """[dead-unit fraction, saturation, RMS slope] of one call of an activation; None where a notion does not apply."""
    rows = out.detach()
    if rows.numel() > UNIT_ENTRIES and rows.shape[0] > 1 and axis % rows.dim() != 0:
        rows = rows[:: -(-rows.numel() // UNIT_ENTRIES)]
    alive = active(kind, rows, parameters)
    sampled = activation_sample(out)
    # Both samples must meet the same entries, which they do where both lie in memory alike.
    at = activation_sample(x) if x is not None and (x.shape, x.stride()) == (out.shape, out.stride()) else None
    steep = slope(kind, sampled.float(), None if at is None else at.float(), parameters)
    if steep is None:
        return [None if alive is None else dead_units(alive, axis), None, None]
    flat = (steep < 0.05 * STEEPEST[kind]).float().mean() if kind in STEEPEST else None
    return [None if alive is None else dead_units(alive, axis), flat, steep.square().mean().sqrt()]


# ---- attention ---------------------------------------------------------------------------------------------------

QUERY_ROWS = 256
"""Query rows (over batch and heads) that attention statistics look at."""

ENTROPY_WEIGHTS = 2048
"""Attention weights that the entropy looks at: as many as torch's softmax keeps on one thread."""

HEADS = 8
"""Heads (over the batch) that those rows are taken from, as many different ones as there are."""


def attention_from_weights(weights: Tensor) -> Tensor:
    """Mean entropy of attention weights [..., queries, keys] over log(keys with weight), in [0, 1]."""
    rows = weights.detach().reshape(-1, weights.shape[-1])
    return _entropy(rows[:: _stride(len(rows), QUERY_ROWS, weights.shape[-2])].float())


def attention_from_operands(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """(entropy, largest |logit| before any mask is added) from queries and keys [..., tokens, dim].

    Queries are strided from the last one so that at most `QUERY_ROWS` rows are formed. `mask`: True for visible keys,
    or what is added to the logits; under a causal mask query i sees keys 0..i.
    """
    tokens, heads = query.shape[-2], list(np.ndindex(*query.shape[:-2]))
    heads = heads[:: _stride(len(heads), HEADS, query.shape[-3] if query.dim() > 2 else 1)]
    group = query.shape[-3] // key.shape[-3] if query.dim() > 2 else 1  # heads that share one head of keys
    shared = [(*head[:-1], head[-1] // group) for head in heads] if group > 1 else heads
    limit = min(QUERY_ROWS, max(8, ACTIVATION_SAMPLE // key.shape[-2]))
    chosen = torch.arange(tokens - 1, -1, -min(-(-len(heads) * tokens // limit), tokens), device=query.device)
    queries = torch.stack([query.detach()[head][chosen] for head in heads]).float()
    keys = torch.stack([key.detach()[head] for head in shared]).float()
    with torch.autocast(query.device.type, enabled=False):
        logits = queries @ keys.transpose(-2, -1) * scale
    visible, bias = torch.ones_like(logits, dtype=torch.bool), torch.zeros(())
    if causal:
        visible &= torch.arange(key.shape[-2], device=key.device) <= chosen[:, None]
    if mask is not None:
        whole = mask.detach().expand((*query.shape[:-1], key.shape[-2]))
        some = torch.stack([whole[head][chosen] for head in heads])
        visible &= some if some.dtype == torch.bool else some > -math.inf
        bias = bias if some.dtype == torch.bool else some.float()
    rows = (logits + bias).masked_fill(~visible, -math.inf).reshape(-1, key.shape[-2])
    few = rows[:: _stride(len(rows), max(8, ENTROPY_WEIGHTS // key.shape[-2]), len(rows))]
    return _entropy(torch.softmax(few, -1)), torch.where(visible, logits, 0.0).abs().max()


def _entropy(rows: Tensor) -> Tensor:
    seen = (rows > 0).sum(-1)
    entropy = -torch.xlogy(rows, rows).sum(-1)
    several = seen > 1
    share = torch.where(several, entropy / seen.clamp_min(2).float().log(), torch.nan)
    return share.nanmean()
