"""What a Keras model consists of: layers, parameters, optimizers and their names. Reads only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import keras
from keras import activations, layers

from isograd._history import Layer, Parameter

_KINDS: tuple[tuple[str, str], ...] = (
    ("TimeDistributed", "other"), ("Bidirectional", "other"), ("Dense", "linear"), ("ConvLSTM", "lstm"),
    ("Conv", "conv"), ("Embedding", "embedding"), ("BatchNorm", "batch-norm"), ("LayerNorm", "layer-norm"),
    ("GroupNorm", "group-norm"), ("RMSNorm", "rms-norm"), ("Dropout", "dropout"), ("GaussianNoise", "dropout"),
    ("LeakyReLU", "leaky-relu"), ("PReLU", "leaky-relu"), ("ReLU", "relu"), ("ELU", "elu"), ("Softmax", "softmax"),
    ("Pool", "pool"), ("MultiHeadAttention", "attention"), ("GroupedQueryAttention", "attention"),
    ("Attention", "attention"), ("SimpleRNNCell", "rnn-cell"), ("LSTMCell", "lstm-cell"), ("GRUCell", "gru-cell"),
    ("LSTM", "lstm"), ("GRU", "gru"), ("RNN", "rnn"), ("Flatten", "flatten"), ("Reshape", "flatten"),
    ("Identity", "identity"),
)  # fmt: skip
"""First match of a Keras class name, longest names first where one contains another."""

_FUNCTIONS: Mapping[str, str] = {
    "relu": "relu", "leaky_relu": "leaky-relu", "relu6": "hardtanh", "elu": "elu", "celu": "elu", "selu": "selu",
    "gelu": "gelu", "silu": "silu", "swish": "silu", "sigmoid": "sigmoid", "tanh": "tanh", "hard_tanh": "hardtanh",
    "softplus": "softplus", "softsign": "softsign", "softmax": "softmax", "log_softmax": "log-softmax",
    "linear": "identity",
}  # fmt: skip
"""Names of activation functions."""

ACTIVATIONS = frozenset(
    {"relu", "leaky-relu", "elu", "selu", "gelu", "silu", "sigmoid", "tanh", "hardtanh", "softplus", "softsign"}
)

_HYPERPARAMETERS: Mapping[str, str] = {
    "momentum": "momentum", "nesterov": "nesterov", "rho": "alpha", "epsilon": "eps",
    "weight_decay": "weight_decay", "amsgrad": "amsgrad", "centered": "centered", "clipnorm": "clipnorm",
    "clipvalue": "clipvalue", "global_clipnorm": "global_clipnorm", "use_ema": "use_ema",
    "gradient_accumulation_steps": "gradient_accumulation_steps", "loss_scale_factor": "loss_scale_factor",
}  # fmt: skip
"""Keras's names of hyperparameters and those of the run file, which are PyTorch's where it has them."""


def kind_of(layer: Any) -> str:
    """The framework-neutral kind of a layer or operation, by the Keras class that it is or derives from."""
    if isinstance(layer, layers.Activation):
        return kind_of_function(layer.activation)
    for cls in type(layer).__mro__:
        if cls.__module__.startswith("keras.") and cls not in (keras.Layer, keras.Model):
            if cls.__module__.startswith("keras.src.ops"):
                return _FUNCTIONS.get(_snake(cls.__name__), "other")
            return next((kind for part, kind in _KINDS if part in cls.__name__), "other")
    return "other"


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))


def kind_of_function(function: Any) -> str:
    """The kind of an activation function, or of a layer that is used as one."""
    if isinstance(function, keras.Layer):
        return kind_of(function)
    return _FUNCTIONS.get(getattr(function, "__name__", ""), "other")


def fused_activation(layer: Any) -> Any:
    """The activation function that a layer with weights applies to its own result, or None."""
    function = getattr(layer, "activation", None)
    if function is None or function is activations.linear or isinstance(layer, (layers.Activation, layers.RNN)):
        return None
    return function if callable(function) and kind_of(layer) in ("linear", "conv") else None


def constants_of(thing: Any) -> dict[str, float]:
    """What the slope of an activation depends on: of a layer, or of an activation function with its defaults."""
    if isinstance(thing, layers.Activation):
        thing = thing.activation
    if isinstance(thing, layers.LeakyReLU):
        return {"negative_slope": float(thing.negative_slope)}
    if isinstance(thing, layers.ELU):
        return {"alpha": float(thing.alpha)}
    name = getattr(thing, "__name__", "")
    if name == "selu":
        return {"alpha": 1.6732632423543772, "scale": 1.0507009873554805}
    return {"low": 0.0, "high": 6.0} if name == "relu6" else {}


def is_leaf(layer: Any) -> bool:
    """Whether values are read at this layer: it holds variables itself, or nothing below it does anything."""
    if isinstance(layer, (keras.Model, layers.Wrapper)):
        return False
    return isinstance(layer, layers.RNN) or not getattr(layer, "_layers", ()) or bool(own_weights(layer))


def own_weights(layer: Any) -> list[Any]:
    """The variables that a layer made for training, frozen or not, without those of the layers in it."""
    return list(getattr(layer, "_trainable_variables", ()))


def fans(layer: Any) -> tuple[int, int]:
    """(fan-in, fan-out) of one unit, as in Glorot & Bengio 2010: for convolutions times the receptive field."""
    if isinstance(layer, layers.RNN):
        kernel = getattr(layer.cell, "kernel", None)
        return (int(kernel.shape[0]), int(getattr(layer.cell, "units", 0))) if kernel is not None else (0, 0)
    if isinstance(layer, layers.Embedding):
        return 1, int(layer.output_dim)
    kernel = getattr(layer, "kernel", None)
    shape = tuple(getattr(kernel, "shape", ()) or ())
    if len(shape) < 2 or kind_of(layer) not in ("linear", "conv"):
        return 0, 0
    field, groups = math.prod(shape[:-2]), int(getattr(layer, "groups", 1) or 1)
    if "Transpose" in type(layer).__name__:
        return shape[-1] * field, shape[-2] * field
    if isinstance(layer, layers.EinsumDense):
        entering, result = str(layer.equation).replace(".", "").split("->")
        letters = entering.partition(",")[2].strip()
        summed = math.prod(n for letter, n in zip(letters, shape, strict=True) if letter not in result)
        return summed, math.prod(shape) // summed
    return shape[-2] * field, shape[-1] * field // groups


def layer_of(name: str, layer: Any) -> Layer:
    """The description of a layer before it was ever called."""
    fan_in, fan_out = fans(layer)
    return Layer(name=name, kind=kind_of(layer), type=type(layer).__name__, fan_in=fan_in, fan_out=fan_out)


def feature_axis(layer: Any, dims: int) -> int:
    """Where a layer's features are: the last axis, or the one behind the batch where channels come first."""
    first = getattr(layer, "data_format", None) == "channels_first"
    axis = getattr(layer, "axis", None)
    if isinstance(layer, layers.BatchNormalization) and isinstance(axis, int):
        return axis
    return 1 if first and dims > 2 else -1


def layers_of(model: Any) -> Iterator[Any]:
    """Every layer below a model once, in the order in which they were added, without the model itself."""
    seen = {id(model)}
    for layer in model._flatten_layers(include_self=False):
        if id(layer) not in seen:
            seen.add(id(layer))
            yield layer


def names_of(model: Any) -> dict[int, str]:
    """id of a layer -> its name: Keras's own, with the names of what holds it where that is not unique."""
    found, taken = {}, set[str]()
    for layer in layers_of(model):
        name = str(layer.name)
        if name in taken:
            name = str(getattr(layer, "path", None) or name).partition("/")[2] or name
        unique, number = name, 2
        while unique in taken:
            unique, number = f"{name}-{number}", number + 1
        taken.add(unique)
        found[id(layer)] = unique
    return found


def variables_of(model: Any) -> list[tuple[str, str, Any]]:
    """(name, layer that it belongs to, variable) of everything that was made to be trained, frozen or not."""
    names = names_of(model)
    found: list[tuple[str, str, Any]] = []
    cells = {id(layer.cell): names[id(layer)] for layer in layers_of(model) if isinstance(layer, layers.RNN)}
    for layer in layers_of(model):
        owner = cells.get(id(layer), names[id(layer)])
        path = owner if owner == names[id(layer)] else f"{owner}/{layer.name}"
        found.extend((f"{path}/{variable.name}", owner, variable) for variable in own_weights(layer))
    loose = [(str(variable.name), "", variable) for variable in own_weights(model)]
    return found + loose


def parameter_of(name: str, layer: str, variable: Any, group: int) -> Parameter:
    """The description of a variable; `group` is -1 when no optimizer holds it."""
    return Parameter(
        name=name,
        layer=layer,
        shape=tuple(int(extent) for extent in variable.shape),
        dtype=str(keras.backend.standardize_dtype(variable.dtype)),
        trainable=bool(variable.trainable),
        optimized=group >= 0,
        group=group,
    )


def inner(optimizer: Any) -> Any:
    """The optimizer that updates: the one inside a `LossScaleOptimizer`."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def optimizers_of(model: Any) -> list[Any]:
    """The optimizer that the model was compiled with, and others among its attributes (the two of a GAN)."""
    found = [getattr(model, "optimizer", None), *vars(model).values()]
    unique = {id(thing): thing for thing in found if isinstance(thing, keras.optimizers.Optimizer)}
    inside = {id(inner(thing)) for thing in unique.values() if inner(thing) is not thing}
    return [thing for key, thing in unique.items() if key not in inside]


def hyperparameters(optimizer: Any, size: int, rate: float) -> dict[str, Any]:
    """An optimizer's class and hyperparameters under the names of the run file; `rate`: its learning rate at first.

    Read as attributes: its configuration reads variables, which on JAX are elsewhere while a model trains.
    """
    acting = inner(optimizer)
    missing = object()
    values = {name: getattr(acting, key, missing) for key, name in _HYPERPARAMETERS.items()}
    plain: dict[str, Any] = {
        name: value for name, value in values.items() if value is None or isinstance(value, (bool, int, float))
    }
    betas = [getattr(acting, f"beta_{number}", None) for number in (1, 2)]
    if all(isinstance(beta, float) for beta in betas):
        plain["betas"] = betas
    return {"optimizer": type(acting).__name__, "size": size, "lr": rate, **plain}
