"""Published rules, applied to the same recorded runs: what users have without isograd.

Each baseline takes the histories of a run (one per subject) and returns the number of steps seen at its first alarm,
None without one. None of them names a cause. Where a rule wants a quantity that the run file does not hold, the
docstring says what stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isograd._history import Floats, History, Series

Baseline = Callable[[Sequence[History]], "int | None"]
Masks = NDArray[np.bool_]

# The 5th and 95th percentile of a normal distribution lie 2 x 1.645 standard deviations apart.
PERCENTILE_RANGE = 3.29


def nonfinite_loss(histories: Sequence[History]) -> int | None:
    """The loss is NaN or Inf: what Keras's TerminateOnNaN and most loops check."""
    return _earliest(_first(history, "loss_nonfinite", lambda values: values > 0) for history in histories)


# ---- Amazon SageMaker Debugger -----------------------------------------------------------------------------------


def sagemaker_debugger(histories: Sequence[History]) -> int | None:
    """The built-in rules for tensors of a training loop that work without being told which tensors, at their defaults.

    Source: docs.aws.amazon.com/sagemaker/latest/dg/debugger-built-in-rules.html. Rules that need validation data
    (Overfit, Overtraining), image or token batches, or names of tensors (AllZero, UnchangedTensor, TensorVariance) are
    left out.
    """
    return _earliest(rule(history) for history in histories for rule in SAGEMAKER_RULES.values())


def vanishing_gradient(history: History, *, threshold: float = 1e-7) -> int | None:
    """The mean of |g| of some parameter is below `threshold`.

    The root mean square, never smaller than that mean, stands in for it.
    """
    size = np.sqrt(np.array([max(parameter.size, 1) for parameter in history.parameters]))
    return _first(history, "grad_norm", lambda values: values / size < threshold)


def exploding_tensor(history: History) -> int | None:
    """Some gradient, weight, output or loss holds NaN or Inf."""
    counts = ("grad_nonfinite", "weight_nonfinite", "output_nonfinite", "loss_nonfinite")
    return _earliest(_first(history, count, lambda values: values > 0) for count in counts)


def dead_relu(history: History, *, threshold_layer: float = 0.5) -> int | None:
    """More than half of the units of a ReLU layer are inactive.

    Inactive means active on fewer than 1 % of the inputs; here: on none of the batch.
    """
    relu = np.array([layer.kind == "relu" for layer in history.layers], dtype=bool)
    return _first(history, "dead_fraction", lambda values: (values > threshold_layer) & relu)


def saturated_activation(history: History, *, threshold_layer: float = 0.5) -> int | None:
    """More than half of the units of a tanh or sigmoid lie where its slope is below 1e-7: inputs beyond 9.4999, or -23.

    Here: more than half of the outputs have a slope below 5 % of the largest, and some lie beyond that input.
    """
    if "output_max" not in history or "output_min" not in history:
        return None
    kinds = [layer.kind for layer in history.layers]
    tanh, sigmoid = (np.array([kind == wanted for kind in kinds], dtype=bool) for wanted in ("tanh", "sigmoid"))
    high, low = history["output_max"], history["output_min"]
    beyond = (tanh & ((high.values >= np.tanh(9.4999)) | (low.values <= -np.tanh(9.4999)))) | (
        sigmoid & ((high.values >= _sigmoid(16.99999)) | (low.values <= _sigmoid(-23.0)))
    )
    reached = set(high.steps[beyond.any(axis=1)].tolist())
    found = _steps(history, "saturation", lambda values: (values > threshold_layer) & (tanh | sigmoid))
    return next((step + 1 for step in found if step in reached), None)


def poor_weight_initialization(
    history: History,
    *,
    threshold: float = 10.0,
    distribution_range: float = 1e-3,
    patience: int = 5,
    num_steps: int = 10,
) -> int | None:
    """Within ten steps: variances of weights differ tenfold, gradients span too little, or the loss does not fall.

    The mean square of a weight stands in for its variance, 3.29 root mean squares for the gradient's range between the
    percentiles 5 and 95.
    """
    weights = np.array([len(parameter.shape) > 1 for parameter in history.parameters], dtype=bool)
    size = np.sqrt(np.array([max(parameter.size, 1) for parameter in history.parameters]))

    def uneven(values: Floats) -> Masks:
        square = np.where(weights, (values / size) ** 2, np.nan)
        return _spread(square) > threshold

    def narrow(values: Floats) -> Masks:
        return PERCENTILE_RANGE * values / size < distribution_range

    found = (
        _first(history, "weight_norm", uneven),
        _first(history, "grad_norm", narrow),
        _no_lower(_finite_loss(history)[:num_steps], patience),
    )
    return _earliest(step for step in found if step is not None and step <= num_steps)


def weight_update_ratio(history: History, *, large: float = 10.0, small: float = 1e-8) -> int | None:
    """An update is more than ten times the weight, or less than 1e-8 of it."""
    return _first(history, "update_ratio", lambda values: (values > large) | (values < small))


def loss_not_decreasing(history: History, *, num_steps: int = 10, diff_percent: float = 0.1) -> int | None:
    """Every ten steps: the loss is not at least 0.1 % lower than ten steps before."""
    loss = _finite_loss(history)
    for index in range(num_steps, len(loss), num_steps):
        if not loss[index] <= loss[index - num_steps] - abs(loss[index - num_steps]) * diff_percent / 100:
            return index + 1
    return None


SAGEMAKER_RULES: Mapping[str, Callable[..., int | None]] = {
    "VanishingGradient": vanishing_gradient,
    "ExplodingTensor": exploding_tensor,
    "DeadRelu": dead_relu,
    "SaturatedActivation": saturated_activation,
    "PoorWeightInitialization": poor_weight_initialization,
    "WeightUpdateRatio": weight_update_ratio,
    "LossNotDecreasing": loss_not_decreasing,
}


# ---- AutoTrainer ---------------------------------------------------------------------------------------------------

EPOCHS = 20
"""AutoTrainer looks once an epoch; a run is taken for so many."""


@dataclass(frozen=True, kw_only=True)
class AutoTrainerLimits:
    """What AutoTrainer's repository gives `IssueMonitor`: beta_1, beta_2, beta_3, gamma, zeta, eta, delta, Theta."""

    ratio_low: float = 1e-3
    norm_low: float = 1e-4
    ratio_high: float = 70.0
    zero_share: float = 0.7
    swing: float = 0.03
    swinging: float = 0.2
    gain: float = 0.01
    satisfied: float = 0.7
    judged_from: float = 0.3


def autotrainer(histories: Sequence[History], limits: AutoTrainerLimits | None = None) -> int | None:
    """The rules of AutoTrainer (Zhang et al., ICSE 2021) with the limits of its repository.

    At the end of each epoch: NaN in loss, weights or gradients (or a loss beyond 1e5) is an explosion. From 30 % of the
    epochs on, a run that does not converge has dying ReLUs where 70 % of all gradient entries are zero, exploding
    gradients where the first weight's gradient is over 70 times the last one's, vanishing gradients where it is below
    1e-3 of it and below 1e-4, and is slow where no epoch gained 0.01; one that converges is unstable where its accuracy
    swings by 0.03 in a fifth of the epochs. It judges accuracy, which the run file does not hold: the share of the
    first epoch's loss that is gone stands in for it. Not converging is a share below 0.7, or slowness.
    """
    return _earliest(_autotrained(history, limits or AutoTrainerLimits()) for history in histories)


def _autotrained(history: History, limits: AutoTrainerLimits) -> int | None:
    counts = ("loss_nonfinite", "grad_nonfinite", "weight_nonfinite")
    broken = _earliest(_first(history, count, lambda values: values > 0) for count in counts)
    losses = _losses(history)
    ends = np.unique(np.linspace(0, len(losses), min(EPOCHS, len(losses)) + 1).astype(int))[1:].tolist()
    progress = _progress(losses, ends)
    for count, end in enumerate(ends, 1):
        if (broken is not None and broken <= end) or losses[end - 1] >= 1e5:
            return end
        is_judged = count >= max(2, limits.judged_from * len(ends))
        if is_judged and _is_ill(progress[:count], *_weight_gradients(history, end), limits):
            return end
    return None


def _progress(losses: Floats, ends: Sequence[int]) -> list[float]:
    """The share of the first epoch's mean loss that is gone at the end of each epoch."""
    means = [float(np.mean(part)) for part in np.split(losses, ends[:-1])] if ends else []
    return [1 - mean / means[0] if means[0] else 0.0 for mean in means]


def _is_ill(progress: Sequence[float], norms: Floats, zeros: float, limits: AutoTrainerLimits) -> bool:
    is_slow = bool(np.max(np.diff(progress)) < limits.gain)
    if max(progress) >= limits.satisfied and not is_slow:
        return _swings(progress, limits.swing) >= limits.swinging * len(progress)
    ratio = norms[0] / norms[-1] if len(norms) and norms[-1] > 0 else np.nan
    is_vanishing = ratio < limits.ratio_low and norms[0] < limits.norm_low
    return bool(zeros >= limits.zero_share or ratio > limits.ratio_high or is_vanishing or is_slow)


def _weight_gradients(history: History, steps: int) -> tuple[Floats, float]:
    """Norms of the weights' gradients in order of the model, and the share of zero entries, as last read."""
    weights = [index for index, parameter in enumerate(history.parameters) if len(parameter.shape) > 1]
    norms = _last_row(history, "grad_norm", steps)
    zeros = _last_row(history, "grad_zero_fraction", steps)
    sizes = np.array([parameter.size for parameter in history.parameters], dtype=float)
    known = np.isfinite(zeros) if len(zeros) else np.zeros(0, dtype=bool)
    share = float(np.average(zeros[known], weights=sizes[known])) if known.any() else 0.0
    return (norms[weights] if len(norms) else np.zeros(0)), share


def _swings(values: Sequence[float], threshold: float) -> int:
    """How many pairs of a local maximum and a local minimum differ by `threshold` or more."""
    inner = range(1, len(values) - 1)
    highs = [values[i] for i in inner if values[i] >= max(values[i - 1], values[i + 1])]
    lows = [values[i] for i in inner if values[i] <= min(values[i - 1], values[i + 1])]
    return sum(high - low >= threshold for high, low in zip(highs, lows, strict=False))


BASELINES: Mapping[str, Baseline] = {
    "non-finite loss": nonfinite_loss,
    "SageMaker Debugger": sagemaker_debugger,
    "AutoTrainer": autotrainer,
}


# ---- reading -------------------------------------------------------------------------------------------------------


def _steps(history: History, statistic: str, is_bad: Callable[[Floats], Any]) -> list[int]:
    """The steps at which some reading of `statistic` is bad."""
    series = history.series.get(statistic)
    if series is None:
        return []
    with np.errstate(all="ignore"):
        bad = np.asarray(is_bad(series.values)).reshape(len(series), -1).any(axis=1)
    return [int(step) for step in series.steps[bad]]


def _first(history: History, statistic: str, is_bad: Callable[[Floats], Any]) -> int | None:
    """The number of steps seen at the first bad reading."""
    return next((step + 1 for step in _steps(history, statistic, is_bad)), None)


def _earliest(found: Any) -> int | None:
    return min((steps for steps in found if steps is not None), default=None)


def _losses(history: History) -> Floats:
    series = history.series.get("loss", Series([], []))
    return series.values


def _finite_loss(history: History) -> Floats:
    """The losses up to the first that is not finite."""
    losses = _losses(history)
    bad = np.flatnonzero(~np.isfinite(losses))
    return losses[: bad[0]] if len(bad) else losses


def _no_lower(losses: Floats, patience: int) -> int | None:
    """The number of steps after which the loss had not reached a new low for `patience` steps."""
    best = 0
    for index in range(1, len(losses)):
        if losses[index] < losses[best]:
            best = index
        elif index - best >= patience:
            return index + 1
    return None


def _spread(values: Floats) -> Floats:
    """Largest over smallest of each row."""
    known = np.isfinite(values) & (values > 0)
    high = np.max(np.where(known, values, -np.inf), axis=1)
    return np.where(known.any(axis=1), high / np.min(np.where(known, values, np.inf), axis=1), 1.0)


def _last_row(history: History, statistic: str, steps: int) -> Floats:
    series = history.series.get(statistic)
    end = 0 if series is None else int(np.searchsorted(series.steps, steps))
    return series.values[end - 1] if series is not None and end else np.zeros(0)


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))
