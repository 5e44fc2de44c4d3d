"""Where NaN and Inf come from: the first operation whose result is not finite while its operands are, or whose
gradient is not while the gradient that it received was, and the line of the user's source that called it.

The forward pass is looked at when its loss is not finite. The backward pass is looked at beforehand: saved tensors
tell where a derivative is infinite. Only there a hook waits to see whether the gradient breaks.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isograd.frameworks import Shield
from isograd.frameworks.torch import _domains as domains
from isograd.frameworks.torch._source import SourceLines
from isograd.frameworks.torch._trace import NODES, has_memory, operation_name, order, saved

Facts = dict[str, Any]
Tell = Callable[[Facts], None]

REPORTS = 20
"""Non-finite steps of a run that are looked at: a run that stays broken has told all."""

WATCHED = 4
"""Operations looked at before every backward pass between deep steps: those nearest to an infinite derivative."""

PATH = 64
"""Edges from the loss to the watched operations, all together: half a microsecond each."""

ENTRIES = 2**18
"""Entries up to which an operation is looked at between deep steps: a tenth of a millisecond."""


class Graph:
    """The autograd graph of a loss in the order in which the forward pass made it, leaves aside."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self._parents: dict[Any, tuple[Any, int]] = {}
        self.nodes = sorted((n for n in self._walk() if operation_name(n) != "AccumulateGrad"), key=order)
        self.names = tuple(map(operation_name, self.nodes))
        self.position = {node: index for index, node in enumerate(self.nodes)}

    def _walk(self) -> Iterator[Any]:
        seen, waiting = {self.root}, deque([self.root])
        while waiting and len(seen) <= NODES:
            node = waiting.popleft()
            yield node
            for edge, (below, _) in enumerate(node.next_functions):
                if below is not None and below not in seen:
                    seen.add(below)
                    self._parents[below] = node, edge
                    waiting.append(below)

    def path(self, node: Any) -> tuple[int, ...]:
        """The edges that lead from the loss to `node`."""
        edges: list[int] = []
        while node in self._parents:
            node, edge = self._parents[node]
            edges.append(edge)
        return tuple(reversed(edges))

    def name(self, node: Any) -> str:
        """The operation's name; that of a leaf is "AccumulateGrad"."""
        index = self.position.get(node)
        return "AccumulateGrad" if index is None else self.names[index]


def follow(root: Any, path: Iterable[int]) -> Any:
    """The node at the end of `path`, None where this graph has no such path."""
    node = root
    for edge in path:
        edges = node.next_functions
        node = edges[edge][0] if edge < len(edges) else None
        if node is None:
            return None
    return node


# ---- what is said of a place ----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Fault:
    """One place. `bad`: which entries; `place`: operation, input, weight or gradient; `order`: when it was computed."""

    place: str
    operation: str
    reason: str
    bad: Tensor
    node: Any
    order: int
    value: float | str | None = None

    def facts(self) -> Facts:
        """Counts, the value that did it, and the rows (first axis) that hold it."""
        leaf = self.node.variable if hasattr(self.node, "variable") else nearest_leaf(self.node)
        is_batch = self.place != "weight" and not self.reason.endswith("fewer than two values")
        source = {"name": "target" if self.reason == "non-finite target" else "input"} if self.place == "input" else {}
        return {
            "place": self.place,
            "operation": self.operation,
            "reason": self.reason,
            "count": int(self.bad.sum()),
            "size": self.bad.numel(),
            "value": self.value,
            **(source or {"leaf": None if leaf is None else id(leaf)}),
            **(row_facts(self.bad) if is_batch else {}),
        }


def row_facts(bad: Tensor) -> Facts:
    """In how many rows of how many there is a bad entry, and the first of them. Nothing for a single value."""
    if bad.dim() == 0 or not bad.numel():
        return {}
    rows = bad.reshape(bad.shape[0], -1).any(1)
    return {"rows": int(rows.sum()), "num_rows": bad.shape[0], "row_index": int(rows.int().argmax())}


def nearest_leaf(node: Any) -> Tensor | None:
    """The parameter, or other leaf, that is the fewest operations away from `node`."""
    seen, waiting = {node}, deque([node])
    while waiting and len(seen) <= NODES:
        for below, _ in waiting.popleft().next_functions:
            if below is not None and below not in seen:
                if operation_name(below) == "AccumulateGrad":
                    return below.variable  # type: ignore[no-any-return]
                seen.add(below)
                waiting.append(below)
    return None


# ---- the forward pass -----------------------------------------------------------------------------------------------


def first_bad_operation(graph: Graph) -> Fault | None:
    """The first place on the way to a non-finite loss, or None when no saved tensor shows it."""
    found = _Forward(graph).faults()
    return min(found, key=lambda fault: fault.order, default=None)


_UNREADABLE = (RuntimeError, TypeError, IndexError)
"""What torch raises where an operation does not exist for a kind of tensor: quantized, nested, sparse."""


class _Forward:
    """Follows non-finite values from the loss towards the inputs, past every operand that is known to be finite."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def faults(self) -> Iterator[Fault]:
        """Every place where a value on the way may have become non-finite. `is_bad`: the node's result is for sure."""
        seen, waiting = {self._graph.root: True}, deque([(self._graph.root, True)])
        while waiting:
            node, is_bad = waiting.popleft()
            if self._graph.name(node) == "AccumulateGrad":
                yield from self._leaf(node)
                continue
            fault: Fault | None = None
            further: list[tuple[Any, bool]] = []
            with contextlib.suppress(*_UNREADABLE):
                fault, further = self._examine(node, is_bad)
            if fault is not None:
                yield fault
            for below, bad in further:
                if bad > seen.get(below, -1):
                    seen[below] = bad
                    waiting.append((below, bad))

    def _leaf(self, node: Any) -> Iterator[Fault]:
        if not has_memory(node.variable):
            return
        bad = ~torch.isfinite(node.variable.detach())
        if bad.any():
            is_weight = isinstance(node.variable, nn.Parameter)
            place, reason = ("weight", "non-finite weight") if is_weight else ("input", "non-finite data")
            yield Fault(place=place, operation="", reason=reason, bad=bad, node=node, order=-1)

    def _examine(self, node: Any, is_bad: bool) -> tuple[Fault | None, list[tuple[Any, bool]]]:
        """(the fault that this node is, where to look next)."""
        name = self._graph.name(node)
        known = domains.operands(node, name)
        result = domains.result_of(node, name, known)
        bad = None if result is None else domains.bad_entries(name, result)
        if bad is not None and not bad.any():
            return None, []
        lost = {edge: ~torch.isfinite(operand) for edge, operand in known.items()}
        fault = self._outside(node, name, known, lost) or self._born(node, name, bad, lost, is_bad)
        return fault, list(self._further(node, name, lost, is_bad or bad is not None))

    def _outside(self, node: Any, name: str, known: dict[int, Tensor], lost: dict[int, Tensor]) -> Fault | None:
        """Non-finite values that enter from outside the graph: a batch, or what was computed without gradient."""
        for edge, bad in lost.items():
            below = node.next_functions[edge][0] if edge < len(node.next_functions) else None
            if below is None and bad.any():
                is_data = edge == domains.batch_edge(name) or domains.is_target(name, edge)
                value = str(known[edge][bad][0].item())
                return Fault(
                    place="input" if is_data else "operation",
                    operation=name,
                    reason="non-finite target" if domains.is_target(name, edge)
                    else "non-finite data" if is_data
                    else f"{value} in a tensor computed outside the graph",
                    bad=bad, node=node, order=order(node), value=value,
                )  # fmt: skip
        return None

    def _born(self, node: Any, name: str, bad: Tensor | None, lost: dict[int, Tensor], is_bad: bool) -> Fault | None:
        """The node's own doing: entries that are not finite where those of every operand are."""
        if name in domains.CARRIERS:
            return None
        if bad is None:
            # Nothing of the result was saved. It overflowed if it is not finite and every operand is.
            edges = [edge for edge, (below, _) in enumerate(node.next_functions) if below is not None]
            if not is_bad or not edges or not all(edge in lost and not lost[edge].any() for edge in edges):
                return None
            bad = torch.ones(domains.shape_of(node), dtype=torch.bool)
            return Fault(place="operation", operation=name, reason="overflow", bad=bad, node=node, order=order(node))
        for operand in lost.values():
            bad = bad & ~operand if operand.shape == bad.shape else bad & ~operand.any()
        if not bad.any():
            return None
        value = domains.offending_value(node, name, bad)
        why = domains.reason(node, name, value)
        return Fault(place="operation", operation=name, reason=why, bad=bad, node=node, order=order(node), value=value)

    def _further(self, node: Any, name: str, lost: dict[int, Tensor], is_bad: bool) -> Iterator[tuple[Any, bool]]:
        """The nodes whose results may have brought it here; True with one whose result is known not to be finite."""
        edges = [(edge, below) for edge, (below, _) in enumerate(node.next_functions) if below is not None]
        for edge, below in edges:
            if edge in lost:
                if lost[edge].any():
                    yield below, True
            elif self._is_chosen(node, name, edge, below):
                yield below, is_bad and name in domains.CARRIERS and len(edges) == 1

    def _is_chosen(self, node: Any, name: str, edge: int, below: Any) -> bool:
        """Whether any bad entry of an operand goes into the result: `where` and a mask drop some."""
        chosen = _chosen(node, name, edge)
        bad = None if chosen is None else self._bad_entries(below, 6)
        return chosen is None or bad is None or bool((bad & chosen).any())

    def _bad_entries(self, node: Any, depth: int) -> Tensor | None:
        """Which entries of a node's result are not finite, as far as saved tensors of elementwise operations tell."""
        name = self._graph.name(node)
        if name == "AccumulateGrad":
            return ~torch.isfinite(node.variable.detach())
        result = domains.result_of(node, name, domains.operands(node, name))
        if result is not None:
            return ~torch.isfinite(result)
        if name not in ("Mul", "Add", "Sub", "Neg", "Div") or not depth:
            return None
        parts = [self._bad_entries(below, depth - 1) for below, _ in node.next_functions if below is not None]
        known = [part for part in parts if part is not None]
        return functools.reduce(torch.logical_or, known) if known and len(known) == len(parts) else None


def _chosen(node: Any, name: str, edge: int) -> Tensor | None:
    if name == "Where":
        condition = saved(node, "condition")
        return condition if condition is None or edge == 0 else ~condition
    mask = saved(node, "mask") if name == "MaskedFill" and edge == 0 else None
    return None if mask is None else ~mask


# ---- the backward pass ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steep:
    """An operation whose derivative is infinite somewhere, and the largest derivative of this forward pass."""

    node: Any
    name: str
    largest: float


def steep_operations(nodes: Iterable[tuple[Any, str]]) -> list[Steep]:
    """Those that can be read, the steepest first."""
    found: list[tuple[Any, str, Tensor]] = []
    for node, name in nodes:
        with contextlib.suppress(*_UNREADABLE):
            slope = domains.slope(node, name) if domains.may_be_singular(node, name) else None
            if slope is not None and slope.numel() and slope.is_floating_point():
                found.append((node, name, slope.abs().amax().float()))
    # One transfer for all of them: on an accelerator every other way would wait once a node.
    sizes = torch.stack([size for _, _, size in found]).tolist() if found else []
    steep = [Steep(node, name, size) for (node, name, _), size in zip(found, sizes, strict=True)]
    return sorted(steep, key=lambda one: one.largest if math.isfinite(one.largest) else math.inf, reverse=True)


def _singular_at(root: Any, path: tuple[int, ...], name: str) -> Steep | None:
    """The operation called `name` at the end of `path`, if its derivative is not finite; None where it is or where this
    graph has no such place.
    """
    node = follow(root, path)
    if node is None or operation_name(node) != name or math.prod(domains.shape_of(node)) > ENTRIES:
        return None
    with contextlib.suppress(*_UNREADABLE):
        slope = domains.slope(node, name)
        # The sum is finite only if every entry is; where it has overflowed by itself, the entries tell.
        if slope is not None and not math.isfinite(slope.sum()) and not torch.isfinite(slope).all():
            return Steep(node, name, math.inf)
    return None


class _Broken:
    """Waits at an operation without a finite derivative for the gradient to pass; says so if it breaks there."""

    def __init__(self, node: Any, name: str, tell: Callable[[Facts], None]) -> None:
        bad = ~torch.isfinite(domains.slope(node, name))  # type: ignore[arg-type]
        self._value = domains.offending_value(node, name, bad)
        self._reason = domains.slope_reason(node, name, self._value)
        self._name, self._tell = name, tell
        leaf = nearest_leaf(node)
        self._leaf = None if leaf is None else id(leaf)

    def __call__(self, made: Sequence[Tensor | None], received: Sequence[Tensor | None]) -> None:
        """`received`: gradients from the side of the loss; `made`: what goes on towards the inputs."""
        with torch.no_grad():
            if any(not torch.isfinite(gradient).all() for gradient in received if gradient is not None):
                return
            bad = next((b for g in made if g is not None and (b := ~torch.isfinite(g)).any()), None)
            if bad is not None:
                self._tell(
                    {
                        "place": "gradient",
                        "operation": self._name,
                        "reason": self._reason,
                        "count": int(bad.sum()),
                        "size": bad.numel(),
                        "value": self._value,
                        "leaf": self._leaf,
                        **row_facts(bad),
                    }
                )


# ---- a run ------------------------------------------------------------------------------------------------------


class Origins:
    """Looks at the losses of a run, one after the other, for the place where a value became non-finite.

    `lines` is told when nodes may keep their lines; `examine` is called when a backward pass is about to consume the
    graph of `loss`.
    """

    def __init__(self, shield: Shield) -> None:
        self.lines = SourceLines()
        self._shield = shield
        self._watched: OrderedDict[tuple[int, ...], str] = OrderedDict()
        self._reports, self._last_place = 0, ""

    def examine(self, loss: Tensor, *, deep: bool, finite: bool, tell: Tell) -> None:
        """`finite`: whether the loss is. `tell` is called with the facts of every place found, now or while the
        backward pass runs.
        """
        if loss.grad_fn is None or self._reports >= REPORTS or (finite and not deep and not self._watched):
            return
        with torch.no_grad():
            if finite and not deep:
                self._look_ahead(loss.grad_fn, tell)
                return
            graph = Graph(loss.grad_fn)
            if deep:
                self.lines.learn(graph.names, graph.nodes)
            look = self._survey if finite else self._look_back
            look(graph, tell)

    def _look_back(self, graph: Graph, tell: Tell) -> None:
        fault = first_bad_operation(graph)
        if fault is not None:
            self._report(tell, self._source(graph, fault.node), fault.facts())

    def _survey(self, graph: Graph, tell: Tell) -> None:
        """Look at every operation, and choose those that are worth looking at until the next deep step."""
        steep = steep_operations(zip(graph.nodes, graph.names, strict=True))
        for one in steep:
            if not math.isfinite(one.largest):
                self._wait(graph, one, tell)
        for one in reversed(steep[:WATCHED]):
            path = graph.path(one.node)
            self._watched[path] = one.name
            self._watched.move_to_end(path)
        while sum(map(len, self._watched)) > PATH or len(self._watched) > 2 * WATCHED:
            self._watched.popitem(last=False)

    def _look_ahead(self, root: Any, tell: Tell) -> None:
        """Between deep steps only the watched operations are looked at, without a walk through the graph."""
        bad = [one for path, name in self._watched.items() if (one := _singular_at(root, path, name)) is not None]
        if bad:
            graph = Graph(root)
            for one in bad:
                self._wait(graph, one, tell)

    def _wait(self, graph: Graph, steep: Steep, tell: Tell) -> None:
        broken = _Broken(steep.node, steep.name, partial(self._report, tell, self._source(graph, steep.node)))
        steep.node.register_hook(lambda made, received: self._shield.call(broken, made, received))

    def _source(self, graph: Graph, node: Any) -> Facts:
        index = graph.position.get(node)
        found = None if index is None else self.lines.line_of(node, graph.names, index)
        if found is None:
            return {}
        return {"file": found.file, "line": found.line, "function": found.function, "code": found.code}

    def _report(self, tell: Tell, source: Facts, facts: Facts) -> None:
        self._reports += 1
        # Weights that are lost stay lost: told once.
        if self._reports <= REPORTS and not (facts["place"] == self._last_place == "weight"):
            tell({**facts, **source})
        self._last_place = facts["place"]
        if self._reports >= REPORTS:
            self.lines.forbid()
