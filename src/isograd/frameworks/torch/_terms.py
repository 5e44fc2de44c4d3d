"""The summands of a loss, and where the gradient of each one alone enters what it shares with the others.

Both are read from the loss's autograd graph before `backward` consumes it. A hook on a node that only one summand
depends on sees what this summand sends into the nodes that several depend on, its weight included.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from isograd._loss_graph import MOVES
from isograd.frameworks.torch._trace import LOSS_NODES, operation_name, result_shape

TERMS = 8
"""Summands that are told apart; where there are more, what is left of the sum stays one."""

ENTRIES = 512
"""Places where a summand may enter what is shared; beyond that its gradient is not read."""

Edges = Mapping[Any, tuple[Any, ...]]
"""Node -> the nodes below it, None where no gradient goes."""


@dataclass(frozen=True)
class Term:
    """One summand. `entries`: nodes that it alone depends on, each with the (position, target) of its inputs that are
    shared; a target is the place in `arriving` of the tensor that the input is.
    """

    operation: str
    entries: list[tuple[Any, list[tuple[int, int]]]]
    arriving: Arriving


class Arriving:
    """Gradients on their way into tensors, `counts` of them into each: several add up before their norm is taken."""

    def __init__(self, counts: list[int]) -> None:
        self._missing, self._sums = counts, dict[int, Tensor]()

    def add(self, target: int, gradient: Tensor | None) -> Tensor | None:
        """What has arrived in a tensor once all of it has; None before."""
        self._missing[target] -= 1
        if gradient is not None:
            earlier = self._sums.get(target)
            self._sums[target] = gradient if earlier is None else earlier + gradient
        return None if self._missing[target] else self._sums.pop(target, None)


def terms(loss: Any, edges: Edges) -> list[Term]:
    """The summands of a loss from left to right; empty where there is only one.

    `edges` must hold every node below `loss`; where some are missing, no entries are given.
    """
    heads = _summands(loss)
    if len(heads) < 2:
        return []
    masks: dict[Any, int] = {}
    for index, head in enumerate(heads):
        for node in _below(head, edges):
            masks[node] = masks.get(node, 0) | 1 << index
    complete = all(node in edges for node in masks)
    entries = _entries(masks, edges) if complete else {}
    return [_term(operation_name(_unscaled(head)), entries.get(1 << i, [])) for i, head in enumerate(heads)]


def _term(operation: str, entries: list[tuple[Any, tuple[int, ...]]]) -> Term:
    targets: dict[Any, int] = {}
    counts: list[int] = []
    numbered: list[tuple[Any, list[tuple[int, int]]]] = []
    for node, positions in entries:
        numbered.append((node, []))
        for position in positions:
            target = targets.setdefault(node.next_functions[position], len(targets))
            counts[target : target + 1] = [counts[target] + 1 if target < len(counts) else 1]
            numbered[-1][1].append((position, target))
    return Term(operation, numbered, Arriving(counts))


def _entries(masks: Mapping[Any, int], edges: Edges) -> dict[int, list[tuple[Any, tuple[int, ...]]]]:
    """Per summand (its bit) the nodes that it alone depends on and the positions of their inputs that are shared."""
    found: dict[int, list[tuple[Any, tuple[int, ...]]]] = {}
    for node, mask in masks.items():
        shared = tuple(i for i, below in enumerate(edges[node]) if below is not None and _is_shared(masks[below]))
        if shared and not _is_shared(mask):
            found.setdefault(mask, []).append((node, shared))
    return {mask: places for mask, places in found.items() if len(places) <= ENTRIES}


def _is_shared(mask: int) -> bool:
    return mask & (mask - 1) != 0


def _below(head: Any, edges: Edges) -> Iterator[Any]:
    seen, waiting = {head}, [head]
    while waiting:
        node = waiting.pop()
        yield node
        for below in edges.get(node, ()):
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)


# ---- taking a sum apart ----------------------------------------------------------------------------------------------

_SCALINGS = frozenset({"Mul", "Div", "Neg", "Add", "Sub", "Expand"}) | MOVES
"""With a single input that needs a gradient, linear in it up to a constant: the others are data or numbers."""

_REDUCTIONS = frozenset({"Sum", "Mean"})


def _summands(loss: Any) -> list[Any]:
    """The nodes of the summands: the top of the sum is taken apart first."""
    found, waiting = [loss], deque([loss])
    while waiting:
        node = waiting.popleft()
        parts = _parts(node)
        if len(parts) >= 2 and len(found) + len(parts) - 1 <= TERMS:
            place = found.index(node)
            found[place : place + 1] = parts
            waiting.extend(parts)
    return list(dict.fromkeys(found))


def _parts(node: Any) -> list[Any]:
    """The two sides of a sum, or the entries of a stack that is summed; empty where the node is neither.

    Vectors are taken apart only into what has been reduced already (one loss per sample each): the parts of a formula
    such as a squared error or a Kullback-Leibler divergence are no terms of an objective.
    """
    node = _unscaled(node)
    is_reduction = operation_name(node) in _REDUCTIONS
    if is_reduction and _inputs(node):
        node = _unscaled(_inputs(node)[0])
    name, parts = operation_name(node), _inputs(node)
    if name in ("Add", "Sub") and len(parts) == 2:
        is_scalar = not is_reduction and math.prod(result_shape(node)) == 1
        return parts if is_scalar or all(map(_is_reduced, parts)) else []
    if is_reduction and name in ("Stack", "Cat"):
        return parts if all(math.prod(result_shape(part)) == 1 for part in parts) else []
    return []


def _unscaled(node: Any) -> Any:
    """The node below factors, constants and views."""
    while operation_name(node) in _SCALINGS:
        inputs = _inputs(node)
        is_divisor = operation_name(node) == "Div" and node.next_functions[0][0] is None
        if len(inputs) != 1 or is_divisor:
            break
        node = inputs[0]
    return node


def _is_reduced(node: Any) -> bool:
    return operation_name(_unscaled(node)) in _REDUCTIONS | LOSS_NODES


def _inputs(node: Any) -> list[Any]:
    return [below for below, _ in node.next_functions if below is not None]
