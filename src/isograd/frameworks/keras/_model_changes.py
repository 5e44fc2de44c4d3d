"""Changes of what a model computes without another layer: activations, the output activation, precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import keras
from keras import activations, layers

from isograd import _changes
from isograd._changes import CannotApply
from isograd.frameworks.keras import _describe as describe
from isograd.frameworks.keras._site import Effect, Site, output_of

TARGETS: Mapping[str, Callable[..., Any]] = {
    "relu": activations.relu, "leaky-relu": activations.leaky_relu, "elu": activations.elu,
    "selu": activations.selu, "gelu": activations.gelu, "silu": activations.silu, "tanh": activations.tanh,
    "sigmoid": activations.sigmoid, "hardtanh": activations.hard_tanh, "softplus": activations.softplus,
    "softsign": activations.softsign,
}  # fmt: skip

ANSWERS: Mapping[str, Callable[..., Any]] = {
    "identity": activations.linear, "sigmoid": activations.sigmoid, "softmax": activations.softmax,
}  # fmt: skip
"""What an output activation can be replaced with."""


def set_activation(layer: Any, function: Callable[..., Any], back: ExitStack) -> None:
    """Let a layer apply another activation: one with an `activation`, or one that is an activation itself, which
    becomes an `Activation` in place.
    """
    if "activation" in vars(layer):
        back.callback(vars(layer).__setitem__, "activation", layer.activation)
    else:
        back.callback(vars(layer).pop, "activation", None)
        back.callback(setattr, layer, "__class__", type(layer))
        layer.__class__ = layers.Activation
    vars(layer)["activation"] = function


def activation_kind(layer: Any) -> str:
    """The kind of the activation that a layer applies to its own result, or is; "" where there is none."""
    fused = describe.fused_activation(layer)
    if fused is not None:
        return describe.kind_of_function(fused)
    kind = describe.kind_of(layer)
    return kind if kind in (*describe.ACTIVATIONS, "softmax", "log-softmax") and isinstance(layer, keras.Layer) else ""


class ActivationReplacement(Effect):
    """`ReplaceActivations`: that of a layer with weights, a layer of its own, that of a plain recurrent layer. The
    output's stays.
    """

    left = "The weights have been trained with the new activation."

    def __init__(self, change: _changes.ReplaceActivations, site: Site, back: ExitStack) -> None:
        if change.target not in TARGETS:
            raise CannotApply(f"There is no activation {change.target!r}; there are {', '.join(TARGETS)}.")
        output, names = output_of(site.model), describe.names_of(site.model)
        found = 0
        for layer in describe.layers_of(site.model):
            kind = activation_kind(layer)
            if isinstance(layer, layers.SimpleRNNCell) and not change.layers:
                kind = describe.kind_of_function(layer.activation)
            is_meant = _is_named(names[id(layer)], change.layers) if change.layers else not output.holds(layer)
            if kind in change.sources and is_meant:
                set_activation(layer, TARGETS[change.target], back)
                found += 1
        if not found:
            kinds = " or ".join(change.sources)
            raise CannotApply(f"No hidden layer of the model has an activation of the kind {kinds}.")
        self.detail = f"{found} layers"


def _is_named(name: str, wanted: tuple[str, ...]) -> bool:
    """Whether a layer is meant: the activation of `dense` is known as `dense.relu`."""
    return any(one == name or one.startswith(f"{name}.") for one in wanted)


class OutputActivationRemoval(Effect):
    """`RemoveOutputActivation`: behind the last layer with weights, or of it."""

    left = "The weights have been trained without the output activation."

    def __init__(self, change: _changes.RemoveOutputActivation, site: Site, back: ExitStack) -> None:
        output = output_of(site.model)
        found = [one for one in (*output.weighted, *output.behind) if activation_kind(one) == change.kind]
        if not found:
            raise CannotApply(f"The model has no {change.kind} at its last layer with weights, or behind it.")
        for layer in found:
            set_activation(layer, ANSWERS[change.target], back)
        self.detail = ", ".join(str(layer.name) for layer in found)


class PrecisionRaise(Effect):
    """`RaisePrecision`: layers that compute in less than float32 compute in float32."""

    def __init__(self, change: _changes.RaisePrecision, site: Site, back: ExitStack) -> None:
        del change
        every = [site.model, *describe.layers_of(site.model)]
        narrow = [layer for layer in every if layer.compute_dtype in ("float16", "bfloat16")]
        if any(variable.dtype in ("float16", "bfloat16") for variable in site.model.trainable_variables):
            raise CannotApply("The weights were made in half precision: set the dtype policy before the model is made.")
        if not narrow:
            raise CannotApply("The model computes in float32 or wider already.")
        for layer in narrow:
            back.callback(setattr, layer, "dtype_policy", layer.dtype_policy)
            layer.dtype_policy = "float32"
        self.detail = f"{len(narrow)} layers"
