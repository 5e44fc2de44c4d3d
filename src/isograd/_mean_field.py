"""What a network does to signals before it has seen data: a walk over its structure with the weights as they stand.

A network is a list of `Stage`s, sources first. Forward, each stage maps the moments of its inputs over the units of a
wide layer; backward, it multiplies the squared norm of the gradient by one factor per source (`_theory.py`). Weights
of different layers are taken as independent, so that the branches that meet in a sum are uncorrelated. It sees
numbers, no framework and no data; what it does not understand it calls unknown, and all that lies behind it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from isograd._depth import NORMALIZATIONS, WEIGHTED
from isograd._theory import (
    IDENTITY,
    Activation,
    batch_norm_shares,
    expectation,
    largest_of,
    pair,
    slope_square,
    square,
)

UNKNOWN = math.nan
LARGE = 1e6
"""Rows of a batch whose size is not known: as many as the theory needs to call it large."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One operation of a network; `sources` are indices of earlier stages, `kind` says how signals pass it.

    linear, conv, embedding, attention: layers with weights. `weight_variance` is sigma_w^2, fan-in times the mean
    square of the weights (of attention that of the values times that of the output, over `window` tokens),
    `bias_variance` the mean square of the biases.
    batch-norm, layer-norm, group-norm, rms-norm, instance-norm: `gain` and `bias_variance` are mean squares of scale
    and shift. A batch normalization takes statistics over `positions` entries of each sample of the batch, or uses its
    `running` ones (mean square of the mean, variance).
    activation: an elementwise `function`, `layer_kind` as in `Layer`.
    scale, shift: by constants of mean square `gain`, or `bias_variance`, and of mean `offset`.
    average, max-pool: over `window` entries. product: of two signals, summed over `window`. softmax: over `window`.
    mixing: scaled dot-product attention over `window` tokens with queries of `width` entries.
    concatenate: inputs of these `shares` of the result's size. dropout: of the share `rate`.
    input, output, add, multiply, reshape: need nothing else. Any other kind is unknown.
    """

    name: str
    kind: str
    sources: tuple[int, ...] = ()
    layer_kind: str = ""
    function: Activation | None = None
    weight_variance: float = UNKNOWN
    bias_variance: float = 0.0
    offset: float = 0.0
    gain: float = 1.0
    epsilon: float = 0.0
    running: tuple[float, float] | None = None
    positions: float = 1.0
    rate: float = 0.0
    window: float = UNKNOWN
    width: float = UNKNOWN
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Moments:
    """Of one unit of a wide layer: E[x^2], E[x x'] for two rows, and E[x] over units.

    Two rows are two samples of a batch; where there is attention, two tokens of one sample.
    """

    square: float
    product: float
    mean: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LayerPrediction:
    """A layer with weights or an activation, as the theory sees it; NaN for what it does not know.

    `input_rms`, `output_rms`: root mean square of what enters and leaves it. `signal`: gradient norm at its output over
    that at the last layer with weights. `slope`: root mean square of an activation's derivative.
    """

    name: str
    kind: str
    input_rms: float
    output_rms: float
    signal: float
    slope: float = UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the walk found. `layers` run from the input to the output.

    `understood` is the share of stages that the theory covers, `unknown` names the others. `how` says where the
    structure came from: "graph", "sequence", or "nothing" when it could not be told.
    """

    layers: tuple[LayerPrediction, ...] = ()
    understood: float = 0.0
    unknown: tuple[str, ...] = ()
    how: str = "nothing"

    @property
    def weighted(self) -> tuple[LayerPrediction, ...]:
        """The layers with weights."""
        return tuple(layer for layer in self.layers if layer.kind in WEIGHTED)

    @property
    def known(self) -> tuple[LayerPrediction, ...]:
        """Those among them whose gradient is known."""
        return tuple(layer for layer in self.weighted if math.isfinite(layer.signal) and layer.signal > 0)

    @property
    def decades(self) -> float:
        """Decades that the gradient norm gains from the last layer with weights back to the first that is known.

        Negative where it is lost; NaN below two layers.
        """
        known = self.known
        return math.log10(known[0].signal / known[-1].signal) if len(known) > 1 else math.nan

    @property
    def reaches_input(self) -> bool:
        """Whether the gradient at the first layer with weights is known."""
        return bool(self.known) and self.known[0] is self.weighted[0]


def walk(stages: Sequence[Stage], *, start: Moments | None = None, batch: float = LARGE, how: str) -> Prediction:
    """Follow signals forward through `stages`, and gradients back from the last layer with weights.

    `start`: moments of the input; unit variance and independent samples by default. `batch`: samples in a batch.
    """
    consumers, begin = _consumers(stages), start or Moments(1.0, 0.0)
    if not any(stage.kind in _NEED_PRODUCTS for stage in stages):
        begin = replace(begin, product=UNKNOWN)  # following pairs of samples takes most of the time
    moments: list[Moments] = []
    factors: list[tuple[float, ...]] = []
    for index, stage in enumerate(stages):
        following = _following(stages, consumers[index])
        passed, local = _pass(stage, [moments[s] for s in stage.sources], begin, batch, following)
        moments.append(passed)
        factors.append(local)
    weighted = [index for index, stage in enumerate(stages) if stage.kind in WEIGHTED]
    if not weighted:
        return Prediction(how=how)
    gradient = _backward(stages, factors, _tail(stages, consumers))
    return Prediction(
        layers=tuple(_layers(stages, moments, factors, _relative(gradient, weighted[-1]))),
        understood=_understood(stages),
        unknown=tuple(stage.name for stage in stages if _is_unknown(stage)),
        how=how,
    )


def _consumers(stages: Sequence[Stage]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in stages]
    for index, stage in enumerate(stages):
        for source in stage.sources:
            found[source].append(index)
    return found


def _following(stages: Sequence[Stage], consumers: Sequence[int]) -> Activation:
    """The activation that alone reads a stage; the identity where there is none."""
    only = stages[consumers[0]] if len(consumers) == 1 else None
    return only.function if only is not None and only.function is not None else IDENTITY


def _tail(stages: Sequence[Stage], consumers: Sequence[Sequence[int]]) -> set[int]:
    """The stages behind which there is no layer with weights: the way to the loss."""
    tail: set[int] = set()
    for index in range(len(stages) - 1, -1, -1):
        if all(later in tail and stages[later].kind not in WEIGHTED for later in consumers[index]):
            tail.add(index)
    return tail


def _backward(stages: Sequence[Stage], factors: Sequence[tuple[float, ...]], tail: set[int]) -> list[float]:
    """Squared gradient norm with respect to each stage's output, 1 at the last; 0 where no gradient comes from there.

    In the tail what is unknown passes gradients as they are: all layers get them from there.
    """
    gradient = [0.0] * len(stages)
    gradient[-1] = 1.0
    for index in range(len(stages) - 1, -1, -1):
        for source, factor in zip(stages[index].sources, factors[index], strict=True):
            passed = 1.0 if index in tail and math.isnan(factor) else factor
            gradient[source] += gradient[index] * passed if gradient[index] else 0.0
    return gradient


def _relative(gradient: Sequence[float], last: int) -> list[float]:
    return [value / gradient[last] if gradient[last] else UNKNOWN for value in gradient]


def _layers(
    stages: Sequence[Stage],
    moments: Sequence[Moments],
    factors: Sequence[tuple[float, ...]],
    gradient: Sequence[float],
) -> Iterator[LayerPrediction]:
    for index, stage in enumerate(stages):
        is_activation = stage.kind == "activation"
        if is_activation or stage.kind in WEIGHTED:
            yield LayerPrediction(
                name=stage.name,
                kind=stage.layer_kind if is_activation else stage.kind,
                input_rms=_root(moments[stage.sources[0]].square) if stage.sources else UNKNOWN,
                output_rms=_root(moments[index].square),
                signal=_root(gradient[index]),
                slope=_root(factors[index][0]) if is_activation else UNKNOWN,
            )


def _root(value: float) -> float:
    return math.sqrt(value) if value >= 0 else UNKNOWN


def _understood(stages: Sequence[Stage]) -> float:
    counted = [stage for stage in stages if stage.kind not in ("input", "output", "reshape")]
    return 1 - sum(map(_is_unknown, counted)) / len(counted) if counted else 0.0


def _is_unknown(stage: Stage) -> bool:
    return stage.kind not in _STEPS or (stage.kind in _WINDOWED and math.isnan(stage.window))


# ---- one stage --------------------------------------------------------------------------------------------------

Step = Callable[[Stage, Sequence[Moments], float, Activation], tuple[Moments, tuple[float, ...]]]
"""(stage, moments of its inputs, samples in a batch, activation that follows) -> (moments of its output, factor of the
squared gradient norm for each input)."""


def _pass(
    stage: Stage, inputs: Sequence[Moments], start: Moments, batch: float, following: Activation
) -> tuple[Moments, tuple[float, ...]]:
    if stage.kind == "input":
        return start, ()
    step = _STEPS.get(stage.kind)
    if step is not None and (step is _embedding or not any(math.isnan(x.square) for x in inputs)):
        # A signal beyond the range of numbers has no moments.
        with contextlib.suppress(ArithmeticError, ValueError), np.errstate(all="ignore"):
            return step(stage, inputs, batch, following)
    return Moments(UNKNOWN, UNKNOWN, UNKNOWN), (UNKNOWN,) * len(inputs)


def _linear(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    (x,), w = inputs, stage.weight_variance
    return Moments(w * x.square + stage.bias_variance, w * x.product + stage.bias_variance), (w,)


def _embedding(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    return Moments(stage.weight_variance, 0.0), (0.0,) * len(inputs)


def _activation(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    (x,), one = inputs, stage.function or IDENTITY
    mean = expectation(one.value, x.square)
    product = pair(one, x.square, x.product).value if x.product and x.product == x.product else x.product + mean**2
    return Moments(square(one, x.square), product, mean), (slope_square(one, x.square),)


def _batch_norm(
    stage: Stage, inputs: Sequence[Moments], batch: float, following: Activation
) -> tuple[Moments, tuple[float, ...]]:
    (x,) = inputs
    if stage.running is not None:
        (center, spread), gain = stage.running, stage.gain / (stage.running[1] + stage.epsilon)
        return Moments(gain * (x.square + center) + stage.bias_variance, gain * (x.product + center)), (gain,)
    rows, spread = batch * stage.positions, x.square - x.product
    gain = stage.gain * spread / (spread + stage.epsilon) if spread > 0 else 0.0
    share, scale = batch_norm_shares(rows, following) if rows >= 4 else (UNKNOWN, UNKNOWN)
    factor = stage.gain * share * scale / (spread + stage.epsilon) if spread + stage.epsilon > 0 else UNKNOWN
    between = -gain / (rows - 1) if rows > 1 else UNKNOWN
    return Moments(gain + stage.bias_variance, between + stage.bias_variance), (factor,)


def _layer_norm(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    (x,) = inputs
    center = 0.0 if stage.kind == "rms-norm" else x.mean**2
    spread = max(x.square - center, 0.0)
    gain = stage.gain / (spread + stage.epsilon) if spread + stage.epsilon > 0 else UNKNOWN
    mean = math.sqrt(gain) * x.mean if stage.kind == "rms-norm" else 0.0
    product = gain * (x.product - center) + stage.bias_variance
    return Moments(gain * spread + stage.bias_variance, product, mean), (gain,)


def _dropout(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    x, kept = inputs[0], 1 - stage.rate
    return (Moments(x.square / kept, x.product, x.mean), (1 / kept,)) if kept > 0 else (Moments(0, 0), (0.0,))


def _add(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    """Uncorrelated but for their means; of one and the same source twice, twice its value."""
    if len(set(stage.sources)) < len(stage.sources):
        x, count = inputs[0], len(inputs)
        return Moments(count**2 * x.square, count**2 * x.product, count * x.mean), (float(count),) * count
    means = [x.mean for x in inputs]
    cross = sum(means) ** 2 - sum(mean**2 for mean in means)
    total = Moments(sum(x.square for x in inputs) + cross, sum(x.product for x in inputs) + cross, sum(means))
    return total, (1.0,) * len(inputs)


def _multiply(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    x, y = inputs
    total = Moments(x.square * y.square, x.product * y.product, x.mean * y.mean)
    return total, (y.square, x.square)


def _concatenate(
    stage: Stage, inputs: Sequence[Moments], _: float, __: Activation
) -> tuple[Moments, tuple[float, ...]]:
    shares = stage.shares or (1 / len(inputs),) * len(inputs)
    weighted = [sum(s * value for s, value in zip(shares, values, strict=True)) for values in
                ([x.square for x in inputs], [x.product for x in inputs], [x.mean for x in inputs])]  # fmt: skip
    return Moments(*weighted), shares


def _average(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    """Over entries that are as different as two samples are."""
    (x,), window = inputs, stage.window
    return Moments(x.product + (x.square - x.product) / window, x.product, x.mean), (1 / window,)


def _max_pool(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    """The largest of independent Gaussians; of rectified ones where the mean is positive, as behind ReLU."""
    (x,), window = inputs, max(1.0, stage.window)
    rectified = x.mean > 0
    q = 2 * x.square if rectified else x.square
    largest = [largest_of(window, power, rectified=rectified) for power in (1, 2)]
    gain = largest[1] * q / x.square if x.square else 0.0
    return Moments(largest[1] * q, min(gain * x.product, largest[1] * q), largest[0] * math.sqrt(q)), (1.0,)


def _product(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    """Of independent signals; weights of one sign, as those of a softmax, also add up what the summands share."""
    (x, y), inner = inputs, stage.window
    shared = inner * (inner - 1) * x.mean * x.mean * y.product if x.mean else 0.0
    mean = inner * x.mean * y.mean
    total = Moments(inner * x.square * y.square + shared, inner * x.product * y.square + shared, mean)
    return total, (inner * y.square, inner * x.square)


def _softmax(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    """At small logits: every weight is about 1 / window, every derivative too."""
    even = 1 / stage.window
    return Moments(even**2, even**2, even), (even**2,) * len(inputs)


def _mixing(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    """Attention at small logits: one mean over tokens for all; the derivative by query and key is the softmax's."""
    query, key, value = (*inputs, inputs[-1], inputs[-1])[:3]
    even, bend = 1 / stage.window, stage.width * value.square / stage.window**2
    mixed = value.product + even * (value.square - value.product)
    return Moments(mixed, mixed, value.mean), (bend * key.square, bend * query.square, even)


def _attention(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    """A whole layer of it, by the path through its values alone."""
    *others, value = inputs
    gain, even = stage.weight_variance, 1 / stage.window
    mixed = gain * (value.product + even * (value.square - value.product)) + stage.bias_variance
    return Moments(mixed, mixed), (0.0,) * len(others) + (gain * even,)


def _scale(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    (x,), gain = inputs, stage.gain
    return Moments(gain * x.square, gain * x.product, math.copysign(math.sqrt(gain), stage.offset) * x.mean), (gain,)


def _shift(stage: Stage, inputs: Sequence[Moments], _: float, __: Activation) -> tuple[Moments, tuple[float, ...]]:
    (x,) = inputs
    added = stage.bias_variance + 2 * x.mean * stage.offset
    return Moments(x.square + added, x.product + added, x.mean + stage.offset), (1.0,)


def _unchanged(_: Stage, inputs: Sequence[Moments], __: float, ___: Activation) -> tuple[Moments, tuple[float, ...]]:
    return inputs[0], (1.0,) + (0.0,) * (len(inputs) - 1)


_STEPS: dict[str, Step] = {
    "input": _unchanged,
    "linear": _linear,
    "conv": _linear,
    "embedding": _embedding,
    "activation": _activation,
    "batch-norm": _batch_norm,
    **dict.fromkeys(NORMALIZATIONS - {"batch-norm"}, _layer_norm),
    "dropout": _dropout,
    "add": _add,
    "multiply": _multiply,
    "concatenate": _concatenate,
    "average": _average,
    "max-pool": _max_pool,
    "product": _product,
    "softmax": _softmax,
    "mixing": _mixing,
    "attention": _attention,
    "scale": _scale,
    "shift": _shift,
    "output": _unchanged,
    "reshape": _unchanged,
    "identity": _unchanged,
    "flatten": _unchanged,
}
_WINDOWED = frozenset({"average", "max-pool", "product", "softmax", "mixing", "attention"})
_NEED_PRODUCTS = frozenset({"batch-norm", "average", "attention", "mixing", "softmax"})
