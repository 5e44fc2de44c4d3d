"""What is known of the way from a model's output to its loss, in the words that rules read ("loss-graph" events).

On PyTorch the autograd graph tells; a compiled step has none that can be read. Keras says the same by itself: which
loss the model was compiled with, and which layers came last. Operations carry the names that PyTorch gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from isograd.frameworks.keras._reading import Call

_OPERATIONS: Mapping[str, str] = {
    "relu": "Relu", "leaky-relu": "LeakyRelu", "elu": "Elu", "selu": "Elu", "gelu": "Gelu", "silu": "Silu",
    "sigmoid": "Sigmoid", "tanh": "Tanh", "hardtanh": "Hardtanh", "softplus": "Softplus", "softsign": "Div",
    "softmax": "Softmax", "log-softmax": "LogSoftmax", "pool": "Mean", "flatten": "View", "identity": "Alias",
    "dropout": "NativeDropout",
}  # fmt: skip
"""What PyTorch calls the operation of a kind of layer."""

_WEIGHTED: Mapping[str, str] = {"linear": "Addmm", "conv": "Convolution"}

_DISTANCES: Mapping[str, str] = {
    "mean_squared_error": "MseLoss", "mse": "MseLoss", "huber": "HuberLoss", "kl_divergence": "KlDiv",
}  # fmt: skip

_ABSOLUTE = ("mean_absolute_error", "mae")

_FLOATING = 1
"""Axes of sizes that are only known when the step runs count as one."""


def facts(model: Any, calls: Sequence[Call], y: Any, y_pred: Any, *, uses_logits: bool) -> dict[str, Any] | None:
    """The data of a "loss-graph" event; None where a model has several outputs or no loss that is known.

    `calls`: of layers and activations, in their order. `uses_logits`: the backend takes what entered the output's
    softmax or sigmoid in the place of its result, as Keras does on TensorFlow.
    """
    predictions, targets = keras.tree.flatten(y_pred), keras.tree.flatten(y)
    name, config = _loss_of(model)
    if len(predictions) != 1 or not calls:
        return None
    below, weighted = _below(calls)
    shape = _shape(predictions[0])
    one_unit = bool(below) and below[0] == "Softmax" and shape[-1:] == (1,)
    scores = bool(config.get("from_logits"))
    if uses_logits and not one_unit and below[:1] in (["Softmax"], ["Sigmoid"]) and "crossentropy" in name:
        below, scores = below[1:], True
    operation, above = _above(name, scores)
    found: dict[str, Any] = {
        "operations": [*above, *below, *weighted],
        "softmax_sizes": [shape[-1] for name in (*above, *below) if shape and name in ("Softmax", "LogSoftmax")],
        **_architecture(model, calls),
    }
    if operation and len(targets) == 1 and targets[0] is not None:
        expected = _shape(targets[0])
        found["loss"] = {
            "operation": operation,
            "prediction_shape": list(shape),
            "target_shape": list(expected),
            "broadcast": operation in ("MseLoss", "HuberLoss") and _broadcasts(shape, expected),
        }
    return found


def operation_of(model: Any) -> str:
    """What PyTorch calls the loss that a model was compiled with, "" for one that it does not have."""
    name, config = _loss_of(model)
    return _above(name, bool(config.get("from_logits")))[0]


def _loss_of(model: Any) -> tuple[str, dict[str, Any]]:
    """(name as a function, configuration) of the single loss of a model; an empty name where there is another one."""
    loss = getattr(model, "loss", None)
    if isinstance(loss, (list, tuple)) and len(loss) == 1:
        loss = loss[0]
    if isinstance(loss, dict) and len(loss) == 1:
        loss = next(iter(loss.values()))
    if loss is None or isinstance(loss, (list, tuple, dict)):
        return "", {}
    if isinstance(loss, str):
        try:
            loss = keras.losses.get(loss)
        except ValueError:
            return "", {}
    config = loss.get_config() if isinstance(loss, keras.losses.Loss) else {}
    function = getattr(loss, "fn", loss)
    return str(getattr(function, "__name__", "")), config


def _above(name: str, scores: bool) -> tuple[str, list[str]]:
    """(the loss, its operations from the loss down)."""
    if name == "sparse_categorical_crossentropy":
        return "NllLoss", ["NllLoss", "LogSoftmax"] if scores else ["NllLoss", "Log", "Clamp"]
    if name == "categorical_crossentropy":
        # Probabilities are divided by their sum and kept away from 0 before the logarithm.
        return "NllLoss" if scores else "", (
            ["NllLoss", "LogSoftmax"] if scores else ["Neg", "Sum", "Mul", "Log", "Clamp", "Div"]
        )
    if name == "binary_crossentropy":
        chosen = "BinaryCrossEntropyWithLogits" if scores else "BinaryCrossEntropy"
        return chosen, [chosen] if scores else [chosen, "Clamp"]
    if name in _DISTANCES:
        return _DISTANCES[name], [_DISTANCES[name]]
    if name in _ABSOLUTE:
        return "", ["Mean", "Abs", "Sub"]
    return "", [name or "Loss"]


def _below(calls: Sequence[Call]) -> tuple[list[str], list[str]]:
    """(operations behind the last layer with weights, from the output down; that layer's own)."""
    names: list[str] = []
    for call in reversed(calls):
        if call.kind in _WEIGHTED and call.role == "module":
            return names, [_WEIGHTED[call.kind]]
        names.append(_OPERATIONS.get(call.kind, call.type))
    return names, []


def _broadcasts(prediction: Sequence[int], target: Sequence[int]) -> bool:
    """Whether two shapes that Keras has brought to the same rank still are stretched against each other."""
    if abs(len(prediction) - len(target)) > 1:
        return True
    longer, shorter = sorted((list(prediction), list(target)), key=len, reverse=True)
    if len(longer) == len(shorter) + 1 and longer[-1] == 1:
        longer = longer[:-1]
    return len(longer) != len(shorter) or any(a != b for a, b in zip(longer, shorter, strict=True))


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(_FLOATING if extent is None else int(extent) for extent in getattr(tensor, "shape", ()))


# ---- architecture ---------------------------------------------------------------------------------------------------

_MERGING = ("Add", "Concatenate", "Average")


def _architecture(model: Any, calls: Sequence[Call]) -> dict[str, int]:
    """How many products stand in a row, and how many shortcuts and normalizations; empty where code of the user's may
    add what no layer shows.
    """
    if not _is_transparent(model):
        return {}
    return {
        "products": sum(call.kind in _WEIGHTED and call.role == "module" for call in calls),
        "shortcuts": sum(call.type in _MERGING for call in calls),
        "norms": sum(call.kind.endswith("-norm") for call in calls),
    }


def _is_transparent(model: Any) -> bool:
    """Whether a model is made of Keras's own layers, wired by Keras."""
    if type(model).__module__.partition(".")[0] != "keras":
        return False
    return all(type(layer).__module__.partition(".")[0] == "keras" for layer in model._flatten_layers())
