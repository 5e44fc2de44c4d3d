"""What a preflight knows of a model before its first step: predicted from its structure, measured on one batch.

Values only, for `Diagnosis.preflight`. It sees histories and numbers, no framework.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from isograd._depth import WEIGHTED
from isograd._history import History, Layer, Parameter
from isograd._loss_graph import LossFunction, loss_graphs
from isograd._mean_field import LayerPrediction, Prediction
from isograd._theory import stable_sharpness

SIMILAR = 0.98
"""Mean cosine between tokens above which they count as one (rank collapse: Dong et al. 2021, Noci et al. 2022)."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter as it stands, the layer that holds it, and its L2 norm."""

    parameter: Parameter
    layer: Layer
    norm: float


@dataclass(frozen=True, kw_only=True)
class MeasuredLayer:
    """A layer as one batch showed it; NaN where a notion does not apply. `is_module`: it is none of the operations.

    `signal`: gradient norm at its output for a random cotangent of the model's output, over that of the last layer with
    weights. `loss_signal`: L2 norm of the gradient of the loss. `dead`, `saturated`: shares of its units or outputs.
    """

    name: str
    kind: str
    is_module: bool
    output_rms: float
    signal: float
    loss_signal: float = math.nan
    dead: float = math.nan
    saturated: float = math.nan
    similarity: float = math.nan
    logit: float = math.nan


@dataclass(frozen=True, kw_only=True)
class RecurrentLayer:
    """A recurrent layer. `spectral_radius` and `largest_singular_value` are those of its recurrent weights, of the gate
    where they are largest. `decay`: gradient norm at a tenth of the sequence over that at its end, for a random
    cotangent of the last output; `per_step` the factor of one step back. NaN where no sequence was seen.
    """

    layer: str
    kind: str
    spectral_radius: float
    largest_singular_value: float
    time_steps: int = 0
    decay: float = math.nan
    per_step: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """The largest eigenvalue of the Hessian of the loss on the batch, and the largest learning rate that it allows.

    `sharpness` is that of the preconditioned Hessian where `optimizer` is Adam's kind. `products`: Hessian-vector
    products spent; `error`: relative, an estimate from the last iteration. `learning_rate`: the largest in use, NaN
    without an optimizer.
    """

    sharpness: float
    optimizer: str
    momentum: float = 0.0
    nesterov: bool = False
    products: int = 0
    error: float = math.nan
    learning_rate: float = math.nan

    @property
    def stable_learning_rate(self) -> float:
        """Beyond it full-batch training is unstable: 2 / sharpness for gradient descent, 38 / sharpness for Adam."""
        if not self.sharpness > 0:
            return math.inf
        return stable_sharpness(self.optimizer, momentum=self.momentum, nesterov=self.nesterov) / self.sharpness


@dataclass(frozen=True, kw_only=True)
class Start:
    """The loss on the batch, and what it should be for a model that knows nothing yet; `reason` says what that is."""

    loss: float
    expected: float = math.nan
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """Everything that one preflight found. `notes`: what it could not do, in sentences."""

    prediction: Prediction
    layers: tuple[MeasuredLayer, ...] = ()
    recurrences: tuple[RecurrentLayer, ...] = ()
    curvature: Curvature | None = None
    start: Start | None = None
    notes: tuple[str, ...] = ()

    @property
    def weighted(self) -> tuple[MeasuredLayer, ...]:
        """The measured layers that carry weights, from the input to the output."""
        return tuple(layer for layer in self.layers if layer.is_module and layer.kind in WEIGHTED)

    @property
    def known(self) -> tuple[MeasuredLayer, ...]:
        """Those among them that a gradient reached."""
        return tuple(layer for layer in self.weighted if math.isfinite(layer.signal) and layer.signal > 0)

    @property
    def decades(self) -> float:
        """Decades that the gradient norm gained on the batch from the last layer with weights back to the first.

        For a random cotangent; negative where it was lost, NaN where nothing was measured.
        """
        known = self.known
        return math.log10(known[0].signal / known[-1].signal) if len(known) > 1 else math.nan

    @property
    def largest_logit(self) -> float:
        """The largest attention logit; NaN without attention."""
        return max((layer.logit for layer in self.layers if not math.isnan(layer.logit)), default=math.nan)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a number that is not finite is null."""
        facts = {
            "predicted": {
                "decades": self.prediction.decades,
                "understood": self.prediction.understood,
                "structure": self.prediction.how,
                "unknown": self.prediction.unknown,
                "layers": self.prediction.layers,
            },
            "measured": {"decades": self.decades, "largest_logit": self.largest_logit, "layers": self.layers}
            if self.layers
            else None,
            "recurrences": self.recurrences,
            "curvature": self.curvature
            and dataclasses.asdict(self.curvature) | {"stable_learning_rate": self.curvature.stable_learning_rate},
            "loss": self.start,
            "notes": self.notes,
        }
        return {key: _plain(value) for key, value in facts.items()}

    def sentences(self) -> Iterator[str]:
        """What there is to say, a line each."""
        yield from self._of_depth()
        yield from self._of_loss()
        yield from self._of_curvature()
        yield from self._of_units()
        for recurrence in self.recurrences:
            yield _of_recurrence(recurrence)
        yield from self.notes

    def _of_depth(self) -> Iterator[str]:
        prediction, known = self.prediction, self.prediction.known
        if prediction.how == "nothing":
            yield "Structure: could not be told from the module tree, so nothing is predicted from it."
        else:
            kinds = f"; unknown: {_some(prediction.unknown)}" if prediction.unknown else ""
            yield f"Understood {100 * prediction.understood:.0f} % of the structure{kinds}."
        if math.isfinite(prediction.decades):
            yield _decay_of(known, prediction.decades, "predicted")
        if math.isfinite(self.decades):
            yield _decay_of(self.known, self.decades, "measured on the batch")

    def _of_loss(self) -> Iterator[str]:
        if self.start is not None:
            expected = f", {self.start.expected:.4g} expected ({self.start.reason})" if self.start.reason else ""
            yield f"Loss at the start: {self.start.loss:.4g}{expected}."

    def _of_curvature(self) -> Iterator[str]:
        curvature = self.curvature
        if curvature is None:
            return
        of = "preconditioned sharpness" if curvature.optimizer == "adam" else "sharpness"
        yours = f" (yours: {curvature.learning_rate:.3g})" if math.isfinite(curvature.learning_rate) else ""
        limit = curvature.stable_learning_rate
        stable = (
            f"stable up to a learning rate of {limit:.3g}{yours}" if math.isfinite(limit) else "no positive curvature"
        )
        yield f"Largest {of}: {curvature.sharpness:.3g}, {stable}."

    def _of_units(self) -> Iterator[str]:
        for what in ("dead", "saturated"):
            worst = max(self.layers, key=lambda layer: _or_zero(getattr(layer, what)), default=None)
            if worst is not None and _or_zero(getattr(worst, what)) > 0:
                share = 100 * getattr(worst, what)
                yield f"Most {what}: {worst.name}, {share:.0f} % of its {'units' if what == 'dead' else 'outputs'}."
        if math.isfinite(self.largest_logit):
            yield f"Largest attention logit: {self.largest_logit:.3g}."
            collapsed = [layer.name for layer in self.layers if layer.similarity >= SIMILAR]
            if collapsed:
                yield f"Tokens nearly equal (mean cosine {SIMILAR:g} or more) from {collapsed[0]} on."


def _decay_of(known: Sequence[MeasuredLayer | LayerPrediction], decades: float, how: str) -> str:
    where, factor = f"from {known[-1].name} back to {known[0].name}", 10 ** (decades / (len(known) - 1))
    change = f"{'gains' if decades >= 0 else 'loses'} {abs(decades):.1f} decades"
    return f"Gradient norm {where}, {how}: {change}, {factor:.3g} per layer."


def _of_recurrence(found: RecurrentLayer) -> str:
    said = f"Recurrent {found.layer}: spectral radius {found.spectral_radius:.3g}"
    if math.isfinite(found.decay):
        early = max(1, round(found.time_steps / 10))
        said += f", {found.decay:.2g} of the gradient norm left from step {found.time_steps} back to step {early}"
        said += f" ({found.per_step:.3g} per step)"
    return f"{said}."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- from histories ---------------------------------------------------------------------------------------------


def measured_layers(signal: History | None, loss: History | None) -> tuple[MeasuredLayer, ...]:
    """The layers of one step with a random cotangent and of one with the loss, in order of first use."""
    seen = signal if signal is not None else loss
    if seen is None:
        return ()
    used = [layer for layer in seen.layers if layer.role in ("module", "operation") and math.isfinite(layer.position)]
    weighted = [layer for layer in used if layer.kind in WEIGHTED and layer.role == "module"]
    last = _reading(signal, "signal_norm", weighted[-1].name) if weighted else math.nan
    return tuple(_measured(layer, signal, loss, last or math.nan, seen) for layer in used)


def _measured(layer: Layer, signal: History | None, loss: History | None, last: float, seen: History) -> MeasuredLayer:
    return MeasuredLayer(
        name=layer.name,
        kind=layer.kind,
        is_module=layer.role == "module",
        output_rms=_reading(seen, "output_rms", layer.name),
        signal=_reading(signal, "signal_norm", layer.name) / last,
        loss_signal=_reading(loss, "signal_norm", layer.name),
        dead=_reading(seen, "dead_fraction", layer.name),
        saturated=_reading(seen, "saturation", layer.name),
        similarity=_reading(seen, "row_similarity", layer.name),
        logit=_reading(seen, "attention_logit_max", layer.name),
    )


def _reading(history: History | None, statistic: str, name: str) -> float:
    """The first reading of a statistic at a layer; NaN where there is none."""
    series = None if history is None else history.series.get(statistic)
    column = None if history is None else next((i for i, la in enumerate(history.layers) if la.name == name), None)
    if series is None or column is None or not len(series):
        return math.nan
    return float(series.values[0, column])


def start_of(history: History) -> Start | None:
    """The first loss, with its expected value where it is one of the losses for which that is known."""
    series = history.series.get("loss")
    if series is None or not len(series):
        return None
    loss = float(series.values[0])
    function = next((graph.losses[0] for graph in loss_graphs(history) if graph.losses), None)
    expected, reason = _expected(function, history) if function is not None else (math.nan, "")
    return Start(loss=loss, expected=expected, reason=reason)


def _expected(function: LossFunction, history: History) -> tuple[float, str]:
    """ln K for K classes and ln 2 for two: all equally likely. The variance of the targets for the squared error."""
    if function.operation.startswith("NllLoss") and len(function.prediction_shape) > 1:
        classes = function.prediction_shape[1]
        return math.log(classes), f"ln {classes}"
    if function.operation.startswith("BinaryCrossEntropy"):
        return math.log(2), "ln 2"
    if function.operation == "MseLoss":
        name = next((layer.name for layer in history.layers if layer.role == "target"), "")
        spread = _reading(history, "output_std", name)
        return (spread**2, "variance of the targets") if math.isfinite(spread) else (math.nan, "")
    return math.nan, ""
