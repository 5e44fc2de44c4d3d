"""Where a change takes place, the contract of what makes one, and where a model's output begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import keras

from isograd.frameworks.keras import _describe as describe

WEIGHTED = ("linear", "conv")


@dataclass(frozen=True)
class Site:
    """A model, and one of its optimizers: for changes of the model, the one that it was compiled with.

    `outer` is the optimizer as the program knows it; `optimizer` the one inside it, where it scales the loss.
    """

    model: Any
    outer: Any

    @property
    def optimizer(self) -> Any:
        """The optimizer that updates."""
        return describe.inner(self.outer)

    def layers(self, kinds: Sequence[str], names: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
        """(name, layer) of the layers of these kinds, or of those among them with these names."""
        all_names = describe.names_of(self.model)
        for layer in describe.layers_of(self.model):
            name = all_names[id(layer)]
            if describe.kind_of(layer) in kinds and (not names or name in names):
                yield name, layer


class Effect:
    """One change in effect at one site. Its constructor takes (change, site, back) and makes it, or raises CannotApply;
    how to put back each thing that it changes goes onto `back` as it is changed.
    """

    detail = ""
    """What was done, in words."""
    left: str | None = None
    """What stays changed after undoing it once a step has been taken under it, in a sentence."""

    def __init__(self, change: Any, site: Site, back: ExitStack) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Output:
    """What stands at the end of a model: its last layers with weights, and the layers behind them."""

    weighted: tuple[Any, ...]
    behind: tuple[Any, ...]

    def holds(self, layer: Any) -> bool:
        """Whether the layer is one of them."""
        return any(layer is one for one in (*self.weighted, *self.behind))


def output_of(model: Any) -> Output:
    """The end of a model: along its graph where it has one, else by the order in which its layers were made."""
    weighted: list[Any] = []
    behind: list[Any] = []
    graph = graph_of(model)
    if graph is None:
        layers = list(describe.layers_of(model))
        last = max((i for i, layer in enumerate(layers) if describe.kind_of(layer) in WEIGHTED), default=-1)
        return Output(tuple(layers[last : last + 1]) if last >= 0 else (), tuple(layers[last + 1 :]))
    _walk_back(graph, list(graph.outputs), weighted, behind)
    return Output(tuple(weighted), tuple(behind))


def _walk_back(graph: Any, tensors: list[Any], weighted: list[Any], behind: list[Any]) -> None:
    """Follow symbolic tensors to the layers with weights that they come from."""
    seen: set[int] = set()
    waiting = list(tensors)
    while waiting:
        operation, node_index, _ = waiting.pop()._keras_history
        node = operation._inbound_nodes[node_index]
        if id(node) in seen:
            continue
        seen.add(id(node))
        inside = graph_of(operation)
        if inside is not None and any(describe.kind_of(one) in WEIGHTED for one in describe.layers_of(operation)):
            _walk_back(inside, list(inside.outputs), weighted, behind)
        elif describe.kind_of(operation) in WEIGHTED:
            weighted.append(operation)
        else:
            behind.append(operation)
            waiting += node.input_tensors


def graph_of(model: Any) -> Any:
    """The functional graph that a model computes, or None."""
    if isinstance(model, keras.Sequential):
        return getattr(model, "_functional", None)
    return model if hasattr(model, "_nodes_by_depth") and hasattr(model, "outputs") else None
