"""What a remedy needs to know of the program that it is for: its optimizer, its rates, its layers."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isograd._history import History, Layer
from isograd._robust import median

RECURRENT = frozenset({"rnn", "lstm", "gru", "rnn-cell", "lstm-cell", "gru-cell"})
BOUNDED = ("sigmoid", "tanh", "hardtanh", "softsign")
RECTIFIERS = ("relu", "leaky-relu", "elu", "selu", "gelu", "silu", "softplus")
NORMALIZATIONS = ("batch-norm", "layer-norm", "group-norm", "rms-norm")


def is_seen(history: History) -> bool:
    """Whether the program has been watched: of one that has not, no remedy can say that it has no place."""
    return bool(history.layers or history.parameters or history.groups)


def first_group(history: History) -> Mapping[str, Any]:
    """The optimizer's name and hyperparameters of the first parameter group; empty where they are not known."""
    return history.groups[0] if history.groups else {}


def optimizer_name(history: History) -> str:
    """The class of the program's optimizer, or ""."""
    return str(first_group(history).get("optimizer", ""))


def hyperparameter(history: History, name: str) -> float | None:
    """A hyperparameter of the first parameter group, `beta1` and `beta2` included; None where there is none."""
    group = first_group(history)
    if name in ("beta1", "beta2"):
        betas = group.get("betas")
        return float(betas[name == "beta2"]) if isinstance(betas, (list, tuple)) and len(betas) == 2 else None
    value = group.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def first_learning_rate(history: History) -> float | None:
    """The rate of the first group at the first step; the last known one where steps were not read."""
    series = history.series.get("learning_rate")
    if series is not None and series.values.size:
        value = float(series.values[0, 0] if series.values.ndim == 2 else series.values[0])
        if np.isfinite(value):
            return value
    return hyperparameter(history, "lr")


def largest_learning_rate(history: History) -> float | None:
    """The largest rate of the first group over the run: what a schedule started from or warmed up to."""
    series = history.series.get("learning_rate")
    if series is None or not series.values.size:
        return hyperparameter(history, "lr")
    values = series.values[:, 0] if series.values.ndim == 2 else series.values
    known = values[np.isfinite(values)]
    return float(known.max()) if len(known) else hyperparameter(history, "lr")


def rate_in_words(history: History) -> str:
    """The rate of the first group at the first step as code: `lr` where it is not known."""
    rate = first_learning_rate(history)
    return "lr" if rate is None else f"{rate:g}"


def keras_optimizer(history: History) -> str:
    """What Keras calls the program's optimizer; Adam where it is not known."""
    name = optimizer_name(history) or "Adam"
    return {"NAdam": "Nadam", "RAdam": "Adam"}.get(name, name)


def global_gradient_norms(history: History) -> NDArray[np.float64]:
    """The finite global gradient norms of all steps before any clipping; empty where there are none."""
    for name in ("global_grad_norm_unclipped", "global_grad_norm"):
        if name in history:
            values = history[name].values
            return np.asarray(values[np.isfinite(values)], dtype=np.float64)
    return np.zeros(0)


def typical_gradient_norm(history: History) -> float:
    """Their median; NaN where there are none."""
    return median(global_gradient_norms(history))


def weighted(history: History) -> list[Layer]:
    """Linear and convolution modules that were used, in order of first use."""
    return [layer for layer in history.layers if layer.role == "module" and layer.kind in ("linear", "conv")]


def kinds(history: History) -> set[str]:
    """The kinds of all modules and operations."""
    return {layer.kind for layer in history.layers if layer.role in ("module", "operation")}


def hidden_activations(history: History) -> list[Layer]:
    """Activations that stand before the last layer with weights."""
    last = max((layer.position for layer in weighted(history)), default=-1.0)
    return [
        layer
        for layer in history.layers
        if layer.role in ("module", "operation") and layer.kind in (*BOUNDED, *RECTIFIERS) and layer.position < last
    ]


def main_activation(history: History) -> str:
    """The most frequent kind of hidden activation, or ""."""
    found = [layer.kind for layer in hidden_activations(history)]
    return max(sorted(set(found)), key=found.count, default="")


def replace_modules(history: History, replacements: Mapping[str, str]) -> str:
    """Code that puts modules in the place of others: `replacements` has an expression of `layer` for each name."""
    loops = []
    for expression in dict.fromkeys(replacements.values()):
        names = ", ".join(f'"{name}"' for name, other in replacements.items() if other == expression)
        listed = textwrap.indent(
            textwrap.fill(names, 72, break_long_words=False, break_on_hyphens=False), prefix="    "
        )
        inline = f"for name in ({names},):"
        loops.append(inline if len(inline) <= 76 else f"for name in (\n{listed},\n):")
        if re.search(r"\blayer\b", expression):
            loops.append(f"    layer = {history.subject}.get_submodule(name)")
        loops += [f"    new = {expression}", f"    {history.subject}.set_submodule(name, new)"]
    return "\n".join(["# when the model is made, before its optimizer:", *loops]) if loops else ""


def short(value: float) -> float:
    """Two significant digits: what a person would type."""
    return float(f"{value:.2g}")
