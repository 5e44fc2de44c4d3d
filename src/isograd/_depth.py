"""The gradient signal over depth: one number per layer with weights, from the input to the loss.

Under mean-field theory the norm of the gradient with respect to a layer's output changes by sqrt(chi) per layer
whatever the width, so its logarithm is a straight line over depth and a slope in decades per layer says all
(`_theory.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isograd._history import History, Series
from isograd._robust import Floats, log10_positive, theil_sen

READS = ("signal_norm", "grad_norm")
"""The statistics that `profiles` reads."""

WEIGHTED = frozenset(
    {"linear", "conv", "embedding", "rnn", "lstm", "gru", "rnn-cell", "lstm-cell", "gru-cell", "attention"}
)
"""Kinds of layers that carry weights and stand for depth."""

NORMALIZATIONS = frozenset({"batch-norm", "layer-norm", "group-norm", "rms-norm", "instance-norm"})

ACTIVATIONS = frozenset(
    {"relu", "leaky-relu", "elu", "selu", "gelu", "silu", "sigmoid", "tanh", "hardtanh", "softplus", "softsign"}
)

MOST_ROWS = 24
"""Deep readings from which profiles are taken: the first four and an even choice of the rest."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The signal at one step. `columns` index `History.layers` from the input to the loss; `values` are log10 norms."""

    step: int
    columns: NDArray[np.int64]
    values: Floats
    by_parameter: bool

    @property
    def slope(self) -> float:
        """Decades per layer, from the input towards the loss: positive where the gradient vanishes on its way back."""
        return theil_sen(np.arange(len(self.values)), self.values)

    @property
    def lost(self) -> float:
        """Decades between the layers near the loss and those near the input; negative where it grew. NaN if unknown.

        Slope x depth, unless the medians of the outer fifths tell less than half of that: a line through layers that
        do not lie on one says nothing.
        """
        known = self.values[np.isfinite(self.values)]
        if len(known) < 3:
            return float("nan")
        edge = max(1, len(known) // 5)
        ends = float(np.median(known[-edge:]) - np.median(known[:edge]))
        line = self.slope * (len(self.values) - 1)
        if ends * line <= 0:
            return 0.0
        return line if abs(ends) >= abs(line) / 2 else ends


def columns_of(history: History, kinds: frozenset[str]) -> NDArray[np.int64]:
    """Indices of the layers of these kinds that were used, modules and operations only, from the input to the loss."""
    found = [
        (layer.position, index)
        for index, layer in enumerate(history.layers)
        if layer.kind in kinds and layer.role in ("module", "operation") and np.isfinite(layer.position)
    ]
    return np.array([index for _, index in sorted(found)], dtype=np.int64)


def boundary(history: History, role: str) -> NDArray[np.int64]:
    """Indices of the layers with a role of the program's boundary: input, prediction or target."""
    return np.array([index for index, layer in enumerate(history.layers) if layer.role == role], dtype=np.int64)


def profiles(history: History) -> list[Profile]:
    """The signal over depth at some deep steps: with respect to outputs, or to weights if those alone were read."""
    columns = columns_of(history, WEIGHTED)
    series = history.series.get("signal_norm")
    if len(columns) and series is not None and np.isfinite(series.values[:, columns]).any():
        return _rows(series, columns, columns, by_parameter=False)
    weights = {history.parameters[index].layer: index for index in reversed(weight_parameters(history))}
    owned = np.array([index for index in columns if history.layers[index].name in weights], dtype=np.int64)
    norms = history.series.get("grad_norm")
    if norms is None or not len(owned):
        return []
    return _rows(norms, np.array([weights[history.layers[i].name] for i in owned]), owned, by_parameter=True)


def _rows(series: Series, read: NDArray[np.int64], columns: NDArray[np.int64], *, by_parameter: bool) -> list[Profile]:
    values = log10_positive(series.values[:, read])
    usable = np.flatnonzero(np.isfinite(values).any(axis=1))
    return [
        Profile(step=int(series.steps[row]), columns=columns, values=values[row], by_parameter=by_parameter)
        for row in chosen(usable)
    ]


def chosen(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most `MOST_ROWS` of the given indices: the first four, then evenly to the last."""
    if len(rows) <= MOST_ROWS:
        return rows
    spread = np.linspace(4, len(rows) - 1, MOST_ROWS - 4).round().astype(np.int64)
    return np.asarray(np.concatenate([rows[:4], rows[spread]]))


def weight_parameters(history: History) -> list[int]:
    """Indices of trainable parameters with two or more axes: weights, not biases or gains."""
    return [index for index, p in enumerate(history.parameters) if p.trainable and len(p.shape) >= 2]
