"""What a pytree of parameters consists of: names, layers, and the order in which a forward pass uses them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isograd._history import Layer, Parameter

_RANKS = {"embedding": 0, "conv": 1, "linear": 2}
"""Among layers side by side: embeddings first, dense layers last, convolutions and blocks of layers between them."""

_BLOCK = 1

_PASSED_ON = frozenset({"convert_element_type", "copy", "reshape", "transpose", "squeeze", "broadcast_in_dim"})
"""Operations whose result is still the parameter, cast or turned, and no use of it."""


def leaves_of(tree: Any) -> dict[str, Any]:
    """Name -> leaf, in the order of the pytree, of what has a gradient: non-empty floating-point or complex arrays."""
    return {name: leaf for name, leaf in _named(tree) if _is_measured(leaf)}


def parameters_of(tree: Any) -> tuple[Parameter, ...]:
    """Descriptions of the leaves that `leaves_of` gives, in its order.

    A layer is what owns one weight, an array of two axes or more, and is named by its path. Where several weights
    stand side by side (`w1`, `w2`), each is a layer of its own.
    """
    leaves = leaves_of(tree)
    weights: dict[str, int] = {}
    for name, leaf in leaves.items():
        weights[_owner(name)] = weights.get(_owner(name), 0) + (np.ndim(leaf) >= 2)
    return tuple(
        Parameter(name=name, layer=_layer_of(name, leaf, weights), shape=tuple(np.shape(leaf)), dtype=str(_dtype(leaf)))
        for name, leaf in leaves.items()
    )


def layers_of(parameters: Sequence[Parameter], order: Sequence[str] = ()) -> tuple[Layer, ...]:
    """The layers with weights, each with its place in the forward pass; none where the order cannot be known.

    A pytree sorts its keys, so the order is that of the names' numbers (`Dense_2` before `Dense_10`), embeddings first
    and dense layers last, where layers side by side differ by nothing else. `order`: names of parameters or layers in
    the order of use, as `order_of_use` gives them, decides otherwise. Raises ValueError for a name that there is not.
    """
    weights = [p for p in parameters if len(p.shape) >= 2 and p.layer]
    layers = [_layer(p) for p in weights]
    places = _given_places(parameters, layers, order) if order else _natural_places(layers)
    return tuple(replace(layer, position=float(places[layer.name])) for layer in layers if layer.name in places)


def order_of_use(function: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    """Names of the leaves of `params` in the order in which `function(params, *args, **kwargs)` first uses them.

    `function` is the forward pass or the loss; it is traced, not run. For `monitor(order=...)`.
    """
    closed = jax.make_jaxpr(lambda tree: function(tree, *args, **kwargs))(params)
    tracked = {variable: name for variable, (name, _) in zip(closed.jaxpr.invars, _named(params), strict=True)}
    first: dict[str, tuple[int, ...]] = {}
    for name, place in _uses(closed.jaxpr, tracked, ()):
        first.setdefault(name, place)
    return tuple(sorted(first, key=lambda name: first[name]))


# ---- names ----------------------------------------------------------------------------------------------------------


def _named(tree: Any) -> list[tuple[str, Any]]:
    taken: set[str] = set()
    return [(_unique(_name(path), taken), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _name(path: tuple[Any, ...]) -> str:
    """`params/Dense_0/kernel` is `Dense_0/kernel`; the array inside a Flax variable has the variable's name."""
    if len(path) > 1 and getattr(path[0], "key", None) == "params":
        path = path[1:]
    if len(path) > 1 and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/") or "parameter"


def _unique(name: str, taken: set[str]) -> str:
    unique, number = name, 2
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    taken.add(unique)
    return unique


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.dtype(jnp.result_type(leaf))


def _is_measured(leaf: Any) -> bool:
    return bool(jnp.issubdtype(_dtype(leaf), jnp.inexact)) and math.prod(np.shape(leaf)) > 0


def _owner(name: str) -> str:
    return name.rpartition("/")[0]


def _layer_of(name: str, leaf: Any, weights: Mapping[str, int]) -> str:
    owner = _owner(name)
    alone = weights[owner] == 1 and owner
    return name if np.ndim(leaf) >= 2 and not alone else owner


def _layer(weight: Parameter) -> Layer:
    """Fans as in Glorot & Bengio 2010; the last axis of a kernel counts its outputs, the axes before it its inputs."""
    kind = _kind(weight)
    *field, fan_in, units = (1, weight.shape[-1]) if kind == "embedding" else weight.shape
    size = math.prod(field)
    return Layer(
        name=weight.layer, kind=kind, units=units, fan_in=size * fan_in,
        fan_out=units * (size if kind == "conv" else 1), dtype=weight.dtype,
    )  # fmt: skip


def _kind(weight: Parameter) -> str:
    if "embed" in weight.name.lower():
        return "embedding"
    return "conv" if len(weight.shape) >= 3 and "conv" in weight.layer.lower() else "linear"


# ---- order ----------------------------------------------------------------------------------------------------------


def _given_places(parameters: Sequence[Parameter], layers: Sequence[Layer], order: Sequence[str]) -> dict[str, int]:
    known = {layer.name: layer.name for layer in layers} | {p.name: p.layer for p in parameters}
    for name in order:
        if name not in known:
            raise ValueError(f"order names {name!r}, which is no parameter or layer; there are {', '.join(known)}")
    places: dict[str, int] = {}
    for name in order:
        places.setdefault(known[name], len(places))
    return places


def _natural_places(layers: Sequence[Layer]) -> dict[str, int]:
    keys = {layer.name: _natural_key(layer) for layer in layers}
    stems: dict[tuple[str, int], str] = {}
    for name, key in keys.items():
        segments = name.split("/")
        for depth, (rank, _, stem) in enumerate(key):
            if stems.setdefault(("/".join(segments[:depth]), rank), stem) != stem:
                return {}
    return {name: place for place, name in enumerate(sorted(keys, key=lambda name: keys[name]))}


def _natural_key(layer: Layer) -> tuple[tuple[int, int, str], ...]:
    """(rank, number, stem) of each segment of the name: the stem of `Dense_12` is `Dense`."""
    segments = layer.name.split("/")
    ranks = [_BLOCK] * (len(segments) - 1) + [_RANKS[layer.kind]]
    parts = [re.fullmatch(r"(.*?)[_.-]?(\d*)", segment, re.DOTALL) for segment in segments]
    return tuple(
        (rank, int(part[2] or -1) if part else -1, part[1] if part else "")
        for rank, part in zip(ranks, parts, strict=True)
    )


def _uses(jaxpr: Any, tracked: dict[Any, str], place: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, place) of every operation, also inside functions that are called, that reads a tracked variable."""
    for number, equation in enumerate(jaxpr.eqns):
        read = [(i, tracked[v]) for i, v in enumerate(equation.invars) if not hasattr(v, "val") and v in tracked]
        if not read:
            continue
        here, inner = (*place, number), list(_called(equation.params.values()))
        if equation.primitive.name in _PASSED_ON:
            tracked[equation.outvars[0]] = read[0][1]
        elif not inner:
            yield from ((name, here) for _, name in read)
        for called in inner:
            # What is called takes the last of the operands: before them stand a loop's or a branch's own.
            skipped = len(equation.invars) - len(called.invars)
            passed = {called.invars[i - skipped]: name for i, name in read if 0 <= i - skipped < len(called.invars)}
            yield from _uses(called, passed, here)


def _called(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _called(value)
        elif hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)
