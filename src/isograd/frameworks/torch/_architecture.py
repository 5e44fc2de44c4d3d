"""What the autograd graph says about a model's architecture: its depth, its shortcuts, and where it normalizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from isograd._loss_graph import MOVES, POOLINGS, PRODUCTS
from isograd.frameworks.torch._trace import order, result_shape

Edges = Mapping[Any, tuple[Any, ...]]
"""Node -> the nodes below it, None where no gradient goes."""

NORMALIZATIONS = frozenset(
    {"NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "FusedRmsNorm"}
)

_LOOKS = 5000
"""Nodes that the search for shortcuts looks at in all."""

_MATRIX_PRODUCTS = frozenset({"Mm", "Addmm", "Bmm", "Baddbmm"})
"""Operations whose last two operands are the left and the right factor of a matrix product."""

_MESSAGES = frozenset({"IndexAdd", "ScatterAdd", "ScatterReduce", "SegmentReduce", "SparseMm", "SparseAddmm"})
"""Operations with which graph networks sum what neighbors send."""

_FUSED_RECURRENCES = frozenset({"CudnnRnn", "MkldnnRnnLayer", "MiopenRnn"})

_CARRIERS = (
    MOVES - {"Select", "Unbind", "Split"}
    | POOLINGS - {"Mean"}
    | NORMALIZATIONS
    | {"Mul", "Div", "Neg", "NativeDropout", "Relu", "Expand", "ConstantPadNd"}
)
"""What a shortcut may pass on its way and still be one: nothing here mixes features or positions."""


def facts(edges: Edges, names: Mapping[Any, str]) -> dict[str, int]:
    """`products`, `shortcuts`, `norms`, `post_norms` and `mixings`, as `LossGraph` defines them.

    `names`: each node's operation. Nodes that were made on one thread are assumed, as of one forward pass they are.
    """
    graph = _Graph(edges, names)
    joins = list(graph.joins())
    norms = graph.norms()
    added = {join for join in joins if names[join] != "Cat"}
    return {
        "products": max(graph.depth.values(), default=0),
        "shortcuts": len(joins),
        "norms": len(norms),
        "post_norms": sum(graph.reads_alone(norm, inside, added) for norm, inside in norms.items()),
        "mixings": sum(graph.mixes_rows(node) for node in names),
    }


class _Graph:
    """A graph with what is known of each node: `readers` above it, `depth` products below it (its own included)."""

    def __init__(self, edges: Edges, names: Mapping[Any, str]) -> None:
        self._edges, self._names, self._looks = edges, names, _LOOKS
        self._order = {node: order(node) if names[node] != "AccumulateGrad" else -1 for node in edges}
        self.readers: dict[Any, set[Any]] = {}
        for node, below in edges.items():
            for following in below:
                self.readers.setdefault(following, set()).add(node)
        self.depth: dict[Any, int] = {}
        for node in sorted(edges, key=self._order.__getitem__):
            deepest = max((self.depth.get(below, 0) for below in self._inputs(node)), default=0)
            self.depth[node] = deepest + self._multiplies(node)

    def _inputs(self, node: Any) -> list[Any]:
        return [below for below in self._edges.get(node, ()) if below is not None]

    def _multiplies(self, node: Any) -> bool:
        """Whether a node multiplies with weights; not, as in attention, two activations."""
        name = self._names[node]
        if name in _FUSED_RECURRENCES:
            return True
        return (
            name in PRODUCTS
            and not self.mixes_rows(node)
            and sum(self.depth.get(below, 0) > 0 for below in self._inputs(node)) < 2
        )

    def mixes_rows(self, node: Any) -> bool:
        """Whether a node combines rows of an activation: messages, attention, or a product with it on the right."""
        name, below = self._names[node], self._edges.get(node, ())
        if name in _MESSAGES or name.startswith("ScaledDotProduct"):
            return any(self.depth.get(source, 0) > 0 for source in below if source is not None)
        if name not in _MATRIX_PRODUCTS or len(below) < 2:
            return False
        left, right = below[-2:]
        is_weight = left is not None and self.depth.get(left, 0) == 0
        return right is not None and self.depth.get(right, 0) > 0 and not is_weight

    # ---- shortcuts --------------------------------------------------------------------------------------------------

    def joins(self) -> Iterator[Any]:
        """Where an activation meets what was computed from it through more products than it passed itself."""
        for node, name in self._names.items():
            sides = self._inputs(node) if name in ("Add", "Sub", "Cat") else []
            if len(sides) >= 2 and math.prod(result_shape(node)) > 1:
                short, *_, long = sorted(sides, key=lambda side: self.depth.get(side, 0))
                may_project = name != "Cat"
                if self._rejoins(short, long, may_project) or self._rejoins(long, short, may_project):
                    yield node

    def _rejoins(self, short: Any, long: Any, may_project: bool) -> bool:
        """Whether `long` was computed from where the shortcut `short` began, through more products than that."""
        passed = self._sources(short, may_project)
        passed = {source: n for source, n in passed.items() if self.depth[source] + n < self.depth.get(long, 0)}
        oldest = min((self._order[source] for source in passed), default=math.inf)
        seen, waiting = {long}, [long] if passed else []
        while waiting and self._looks > 0:
            node = waiting.pop()
            self._looks -= 1
            if node in passed:
                return True
            fresh = set(self._inputs(node)) - seen
            seen |= fresh
            waiting += [below for below in fresh if self._order.get(below, -1) >= oldest]
        return False

    def _sources(self, short: Any, may_project: bool) -> dict[Any, int]:
        """Where a shortcut may have begun, with the products from there on: none or, where it may project, one."""
        found: dict[Any, int] = {}
        node, products = short, 0
        while self._names.get(node, "AccumulateGrad") != "AccumulateGrad" and len(found) < 12:
            found[node] = products
            products += self._multiplies(node)
            inputs = self._inputs(node)
            is_open = self._names[node] in _CARRIERS or self._multiplies(node)
            if not is_open or not inputs or products > may_project:
                break
            # Of a gate and what it lets through, the latter has seen fewer products; weights have seen none.
            activations = [below for below in inputs if self.depth.get(below, 0)] or inputs
            pick = min if self._names[node] == "Mul" else max
            node = pick(activations, key=lambda below: self.depth.get(below, 0))
        return found

    # ---- normalizations ---------------------------------------------------------------------------------------------

    def norms(self) -> dict[Any, set[Any]]:
        """Each normalization's last node, with all of its nodes: more than one where it was written out."""
        found = {node: {node} for node, name in self._names.items() if name in NORMALIZATIONS}
        for node, name in self._names.items():
            if name in ("Rsqrt", "Sqrt", "Std") and (statistic := self._statistic(node)):
                scaled = self._scaled_by(node)
                if scaled is not None:
                    found[scaled] = self._written_out(scaled, statistic)
        return found

    def _statistic(self, node: Any) -> set[Any]:
        """The chain from a root down to the mean or variance under it; empty where there is none."""
        chain = {node}
        for _ in range(5):
            if self._names[node] in ("Mean", "Var", "Std"):
                return chain
            inputs = self._inputs(node)
            if len(inputs) != 1 or inputs[0] not in self._names:
                break
            node = inputs[0]
            chain.add(node)
        return set()

    def _scaled_by(self, node: Any) -> Any:
        """The product or quotient in which a root meets the values that it normalizes."""
        for _ in range(3):
            readers = self.readers.get(node, set())
            if len(readers) != 1:
                return None
            (node,) = readers
            if self._names[node] in ("Mul", "Div") and len(self._inputs(node)) == 2:
                return node
        return None

    def _written_out(self, last: Any, statistic: set[Any]) -> set[Any]:
        """The nodes of a normalization that was written out, down to the values that it reads."""
        inside, waiting = {last} | statistic, [last, *statistic]
        while waiting and len(inside) < 20:
            for below in self._inputs(waiting.pop()):
                is_part = self._names.get(below) in ("Sub", "Pow", "Mean", "Var", "Add", "ToCopy", "Rsqrt", "Sqrt")
                if below not in inside and is_part and self.readers[below] <= inside and self._leads_into(below):
                    inside.add(below)
                    waiting.append(below)
        return inside

    def _leads_into(self, node: Any) -> bool:
        """Whether a part has one input, or is a difference from a mean: an addition of two activations is no part."""
        inputs = self._inputs(node)
        return len(inputs) == 1 or (self._names[node] == "Sub" and any(self._names.get(i) == "Mean" for i in inputs))

    def reads_alone(self, norm: Any, inside: set[Any], joins: set[Any]) -> bool:
        """Whether a normalization is the only reader of one of the `joins`."""
        outside = {below for node in inside for below in self._inputs(node)} - inside
        for node in outside:
            at, readers = node, inside
            for _ in range(4):
                if at in joins:
                    return self.readers[at] <= readers
                inputs = self._inputs(at)
                if self._names.get(at) not in _CARRIERS or len(inputs) != 1 or not self.readers[at] <= readers:
                    break
                at, readers = inputs[0], {at}
        return False
