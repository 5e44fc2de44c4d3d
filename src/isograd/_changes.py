"""What can be changed in a training program: the second vocabulary that crosses the boundary to the frameworks.

A change is data. `frameworks/` applies it, undoes it and prints it as code; nothing here imports one. `Change` is a
closed union: a framework that meets a change it cannot express says so in a sentence (`CannotApply`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

ClipMethod = Literal["value", "norm", "tensor-norm", "adaptive", "percentile", "z-score"]
ScheduleShape = Literal["constant", "warm-up", "linear", "step", "exponential", "inverse-sqrt", "cosine", "plateau"]
InitializationMethod = Literal[
    "xavier", "kaiming", "orthogonal", "lsuv", "critical", "fixup", "forget-bias", "chrono", "identity-recurrence"
]
NormalizationKind = Literal["batch", "layer", "group", "rms"]
ShortcutKind = Literal["residual", "rezero", "dense"]


def _check_positive(what: str, number: float) -> None:
    if not 0 < number < float("inf"):
        raise ValueError(f"the {what} must be a finite number above 0, not {number!r}")


def _check_not_negative(what: str, number: float) -> None:
    if not 0 <= number < float("inf"):
        raise ValueError(f"the {what} must be a finite number of 0 or more, not {number!r}")


def _check_count(what: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"the number of {what} must be 1 or more, not {count!r}")


class CannotApply(Exception):
    """A change that this program or framework does not allow; the message is one sentence saying why."""


@dataclass(frozen=True, kw_only=True)
class SetHyperparameter:
    """Give every parameter group's hyperparameter a value, or multiply it with a factor; exactly one of the two.

    `name` is the optimizer's own name for it: lr, momentum, weight_decay, eps, beta1, beta2.
    """

    name: str
    value: float | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.factor is None):
            raise ValueError(f"{self.name}: give either a value or a factor")
        if self.factor is not None:
            _check_not_negative(f"factor on {self.name}", self.factor)
        if self.value is not None:
            _check_not_negative(self.name, self.value)
            if self.name in ("beta1", "beta2") and self.value >= 1:
                raise ValueError(f"{self.name} must be below 1, not {self.value!r}")


@dataclass(frozen=True, kw_only=True)
class ScheduleLearningRate:
    """Multiply the program's own learning rate with a schedule, from the first optimizer step on; "constant" holds the
    largest rate that the program has set so far.

    `steps`: the steps over which it runs (the steps of the warm-up; the period of "step"). `end`: the factor at its
    end ("linear", "exponential", "cosine"), or at each period ("step", "plateau").
    """

    shape: ScheduleShape
    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_count("steps of a schedule", self.steps)


@dataclass(frozen=True, kw_only=True)
class ClipGradients:
    """Clip gradients between the backward pass and the step, behind a finiteness gate: a gradient with NaN or Inf
    is left to `SkipBadSteps`, since clipping would spread it.

    `limit`: the largest entry ("value"), the largest L2 norm of all gradients together ("norm") or of each tensor
    ("tensor-norm"), the largest ratio of a unit's gradient to its weights ("adaptive", Brock et al. 2021), the
    percentile of the norms so far ("percentile", AutoClip), or the number of standard deviations ("z-score", ZClip).
    """

    method: ClipMethod
    limit: float

    def __post_init__(self) -> None:
        _check_positive(f"limit of clipping by {self.method}", self.limit)
        if self.method == "percentile" and self.limit > 100:
            raise ValueError(f"a percentile is at most 100, not {self.limit!r}")


@dataclass(frozen=True, kw_only=True)
class ClampWeights:
    """Clamp every trained weight to [-limit, limit] after each step."""

    limit: float

    def __post_init__(self) -> None:
        _check_positive("limit of a weight", self.limit)


@dataclass(frozen=True, kw_only=True)
class PenalizeWeights:
    """Add the gradient of l1 |w| + l2 w^2 / 2 to the gradient of each weight with two axes or more before the step."""

    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        _check_not_negative("weight of the L1 penalty", self.l1)
        _check_not_negative("weight of the L2 penalty", self.l2)


@dataclass(frozen=True, kw_only=True)
class ReplaceOptimizer:
    """Step with another of the framework's optimizers behind the program's own optimizer object.

    `optimizer`: its class name (SGD, Adagrad, RMSprop, Adam, AdamW …). `hyperparameters`: name and value pairs; what
    is not given keeps the new optimizer's default, except the learning rate, which keeps the program's own.
    """

    optimizer: str
    hyperparameters: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClipUpdates:
    """Shrink an Adam-like step of a tensor to `limit` times the learning rate where its RMS is larger (StableAdamW)."""

    limit: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("limit of an update", self.limit)


@dataclass(frozen=True, kw_only=True)
class ReinitializeLayers:
    """Draw the weights of `layers` afresh before the first step. Where empty: of all with weights, and every other
    trained matrix whose entries are all equal.
    """

    method: InitializationMethod
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReplaceActivations:
    """Put the activation of kind `target` in the place of every module and function call of the kinds `sources`.

    `layers`: only those; where empty, all but the output's.
    """

    sources: tuple[str, ...]
    target: str
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class InsertNormalization:
    """Normalize the outputs of `layers` (all hidden ones with weights where empty); its parameters are trained."""

    kind: NormalizationKind
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class InsertShortcuts:
    """Add a shortcut around every block between equal shapes."""

    kind: ShortcutKind


@dataclass(frozen=True, kw_only=True)
class StandardizeInputs:
    """Subtract the mean and divide by the standard deviation of the first batches, per feature, from then on."""

    batches: int = 8

    def __post_init__(self) -> None:
        _check_count("batches", self.batches)


@dataclass(frozen=True, kw_only=True)
class StandardizeTargets:
    """Train on targets of mean 0 and standard deviation 1, by the statistics of the first batches."""

    batches: int = 8

    def __post_init__(self) -> None:
        _check_count("batches", self.batches)


@dataclass(frozen=True, kw_only=True)
class RemoveOutputActivation:
    """Pass through what the output activation of kind `kind` would have changed: the loss applies it, or needs none.

    `target`: "sigmoid" or "softmax" (over classes) in its place, where the loss takes probabilities.
    """

    kind: str
    target: Literal["identity", "sigmoid", "softmax"] = "identity"


@dataclass(frozen=True, kw_only=True)
class RegisterParameters:
    """Register what modules keep in plain lists and dicts, and let the optimizer train what no optimizer holds."""


@dataclass(frozen=True, kw_only=True)
class ZeroGradients:
    """Clear the gradients after every step, before the next backward pass."""


@dataclass(frozen=True, kw_only=True)
class AverageAccumulation:
    """Divide the gradients by the number of backward passes since the last step."""


@dataclass(frozen=True, kw_only=True)
class RaisePrecision:
    """Hold weights and compute in float32."""


@dataclass(frozen=True, kw_only=True)
class ScaleLoss:
    """Multiply the loss before the backward pass and divide the gradients by the same factor after it."""

    scale: float

    def __post_init__(self) -> None:
        _check_positive("loss scale", self.scale)


@dataclass(frozen=True, kw_only=True)
class SkipBadSteps:
    """Leave weights and optimizer state alone at a step whose gradients hold NaN or Inf."""


Change = (
    SetHyperparameter
    | ScheduleLearningRate
    | ClipGradients
    | ClampWeights
    | PenalizeWeights
    | ReplaceOptimizer
    | ClipUpdates
    | ReinitializeLayers
    | ReplaceActivations
    | InsertNormalization
    | InsertShortcuts
    | StandardizeInputs
    | StandardizeTargets
    | RemoveOutputActivation
    | RegisterParameters
    | ZeroGradients
    | AverageAccumulation
    | RaisePrecision
    | ScaleLoss
    | SkipBadSteps
)
"""Everything that can be changed."""


def to_dict(change: Change) -> dict[str, Any]:
    """A change as plain values: its type and its fields."""
    return {"change": type(change).__name__, **asdict(change)}
