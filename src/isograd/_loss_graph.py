"""What the autograd graph of a loss says about the way from the last layer with weights to the loss.

The observer writes it as an event of kind "loss-graph". Operations have the names that torch gives them, without
`Backward0`; they run from the loss down to the first operation with weights, along first inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isograd._history import History, Layer

PRODUCTS = frozenset({"Addmm", "Mm", "Linear", "Convolution", "Bmm", "Baddbmm", "Addmv", "Mv"})
"""Operations that multiply with weights."""

MOVES = frozenset(
    {
        "View",
        "UnsafeView",
        "ReshapeAlias",
        "Squeeze",
        "Unsqueeze",
        "Select",
        "Slice",
        "Transpose",
        "T",
        "Permute",
        "Clone",
        "Alias",
        "ToCopy",
        "Unbind",
        "Split",
        "AsStrided",
    }
)
"""Operations that move values and leave every one as it is."""

POOLINGS = frozenset({"Mean", "AdaptiveAvgPool2D", "AvgPool2D", "AdaptiveAvgPool1D", "MaxPool2DWithIndices"})


@dataclass(frozen=True, kw_only=True)
class LossFunction:
    """One of the framework's own losses: its operation and the shapes that entered it."""

    operation: str
    prediction_shape: tuple[int, ...] = ()
    target_shape: tuple[int, ...] = ()
    broadcast: bool = False


@dataclass(frozen=True, kw_only=True)
class LossGraph:
    """One reading. `shapes` are those of the operations' results, as far as known; `softmax_sizes` the sizes of the
    dimensions over which the softmaxes among them go; `unoptimized` names the parameters that the loss depends on
    and no optimizer holds; `flat_share` is the share of entries beyond the ends of the clamp nearest the loss.

    What the whole graph says about the architecture, when first read: `products` is the length of the longest chain of
    products with weights between the loss and an input (each time step of a recurrence counts); `shortcuts` the number
    of additions and concatenations where an activation meets what was computed from it through more products than it
    has passed itself (at most one projection); `norms` the number of normalizations; `post_norms` how many of them read
    an addition among the shortcuts that nothing else reads. The final normalization of a pre-norm network is such a
    one, too. `mixings`: operations that combine rows (samples, nodes, tokens) of an activation.
    """

    step: int
    operations: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    softmax_sizes: tuple[int, ...] = ()
    losses: tuple[LossFunction, ...] = ()
    unoptimized: tuple[str, ...] = ()
    flat_share: float = 0.0
    products: int = 0
    shortcuts: int = 0
    norms: int = 0
    post_norms: int = 0
    mixings: int = 0

    @property
    def unregistered(self) -> tuple[str, ...]:
        """Those of `unoptimized` that a module keeps in a list or dict, with an index in their name: no optimizer over
        the module's parameters can hold them.
        """
        return tuple(name for name in self.unoptimized if "[" in name)

    @property
    def above_product(self) -> tuple[str, ...]:
        """The operations between the loss and the last product with weights; empty where there is none."""
        places = [index for index, operation in enumerate(self.operations) if operation in PRODUCTS]
        return self.operations[: places[0]] if places else ()

    @property
    def output_operation(self) -> str:
        """What is done to the last product's result first, moves and pooling left out; empty where nothing is."""
        return next((name for name in reversed(self.above_product) if name not in MOVES | POOLINGS), "")


def loss_graphs(history: History) -> list[LossGraph]:
    """Every distinct reading, in order of time."""
    return [_graph(event.step, event.data) for event in history.events_of("loss-graph")]


def _graph(step: int, data: Mapping[str, Any]) -> LossGraph:
    return LossGraph(
        step=step,
        operations=tuple(str(name) for name in _items(data.get("operations"))),
        shapes=tuple(_sizes(shape) for shape in _items(data.get("shapes"))),
        softmax_sizes=_sizes(data.get("softmax_sizes")),
        losses=tuple(_losses(data)),
        unoptimized=tuple(str(name) for name in _items(data.get("unoptimized"))),
        flat_share=_share(data.get("flat_share")),
        products=_count(data.get("products")),
        shortcuts=_count(data.get("shortcuts")),
        norms=_count(data.get("norms")),
        post_norms=_count(data.get("post_norms")),
        mixings=_count(data.get("mixings")),
    )


def _losses(data: Mapping[str, Any]) -> Iterator[LossFunction]:
    for facts in data.values():
        if isinstance(facts, Mapping) and "operation" in facts:
            yield LossFunction(
                operation=str(facts["operation"]),
                prediction_shape=_sizes(facts.get("prediction_shape")),
                target_shape=_sizes(facts.get("target_shape")),
                broadcast=bool(facts.get("broadcast", False)),
            )


def _share(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 <= value <= 1 else 0.0


def _count(value: Any) -> int:
    return int(value) if isinstance(value, (int, float)) and value >= 0 and value < math.inf else 0


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def _sizes(value: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in _items(value) if isinstance(size, (int, float)))


def output_layer(history: History, kind: str) -> Layer | None:
    """The activation of this kind that stands behind all layers with weights, or None."""
    known = [layer for layer in history.layers if layer.role in ("module", "operation")]
    weighted = max((layer.position for layer in known if layer.kind in ("linear", "conv")), default=float("inf"))
    found = [layer for layer in known if layer.kind == kind and weighted < layer.position < float("inf")]
    return max(found, key=lambda layer: layer.position, default=None)


def column_of(history: History, layer: Layer) -> int:
    """The column of one of the history's layers."""
    return history.layers.index(layer)
