"""Let a model compute another graph of its own layers and of new ones, and stay the same object.

A functional model gets the graph of a new one that is made from the same inputs; a `Sequential` gets another list of
layers. Both save and load as what they are now. Only symbolic values pass: weights are neither moved nor drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import keras

from isograd._changes import CannotApply
from isograd.frameworks.keras import _describe as describe
from isograd.frameworks.keras._site import graph_of

Call = Callable[..., Any]
"""(layer or operation, what it is called with) -> what stands in the place of its result."""

_GRAPH = (
    "_inputs_struct", "_outputs_struct", "_inputs", "_outputs", "_nodes", "_nodes_by_depth", "_operations",
    "_operations_by_depth",
)  # fmt: skip
"""The attributes of a functional model that say what it computes."""


def graphs_of(model: Any) -> list[Any]:
    """The models with a graph at or below a model, innermost first. Raises CannotApply where it is none itself."""
    if graph_of(model) is None:
        name = type(model).__name__
        raise CannotApply(f"{name} computes what its own `call` says: another layer has no place that could be seen.")
    inner = [layer for layer in describe.layers_of(model) if graph_of(layer) is not None]
    return [*reversed(inner), model]


def run_through(
    model: Any,
    back: ExitStack,
    call: Call,
    enter: Callable[[Any], Any] = lambda x: x,
    leave: Callable[[Any], Any] = lambda x: x,
) -> None:
    """Let a functional model compute what `call` makes of each of its calls, `enter` of its inputs, `leave` of its
    outputs.
    """
    outputs = model._run_through_graph([*map(enter, model._inputs)], call_fn=call)
    outputs = keras.tree.map_structure(leave, outputs)
    twin = keras.Model(model._inputs_struct, outputs, name=model.name)
    attached = [layer for layer in model._layers if all(layer is not one for one in model.layers)]
    back.callback(_compute, model, {name: vars(model)[name] for name in _GRAPH}, list(model._layers))
    _compute(model, {name: vars(twin)[name] for name in _GRAPH}, [*twin.layers, *attached])


def _compute(model: Any, graph: dict[str, Any], layers: Sequence[Any]) -> None:
    vars(model).update(graph)
    model._layers[:] = layers
    _take_note(model)


def set_layers(model: Any, layers: Sequence[Any], back: ExitStack) -> None:
    """Let a `Sequential` be these layers; the first is what stands for its input."""
    back.callback(_be, model, list(model._layers))
    _be(model, layers)


def _be(model: Any, layers: Sequence[Any]) -> None:
    model._layers = list(layers)
    model._maybe_rebuild()
    _take_note(model)


def _take_note(model: Any) -> None:
    """PyTorch knows the parameters of a module by a list that Keras makes when it is built."""
    if hasattr(model, "_track_variables"):
        model._track_variables()
