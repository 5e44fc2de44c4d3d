"""Where something stands inside an optimizer's state: chains, wrappers, train states and models' optimizers alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Step(NamedTuple):
    """One step down into a container: an attribute, or else an item."""

    key: Any
    is_attribute: bool


Place = tuple[Step, ...]
"""The way from the outermost container to what stands there."""


def find(root: Any, wanted: Callable[[Any], bool]) -> list[Place]:
    """Places of everything in `root` that is wanted; nothing is looked for inside of that."""
    return list(_find(root, wanted, (), set()))


def at(root: Any, place: Place) -> Any:
    """What stands at `place`. Raises AttributeError, KeyError, IndexError or TypeError where there is no such place."""
    for step in place:
        root = getattr(root, step.key) if step.is_attribute else root[step.key]
    return root


def replaced(root: Any, place: Place, value: Any) -> Any:
    """`root` with `value` at `place`: a copy of the containers on the way there, unless they can only be changed."""
    if not place:
        return value
    step, rest = place[0], place[1:]
    below = replaced(at(root, (step,)), rest, value)
    if step.is_attribute:
        if isinstance(root, tuple):
            return root._replace(**{step.key: below})  # type: ignore[attr-defined]
        if dataclasses.is_dataclass(root) and not isinstance(root, type):
            return dataclasses.replace(root, **{step.key: below})
        setattr(root, step.key, below)
        return root
    if isinstance(root, Mapping):
        return type(root)({**root, step.key: below})  # type: ignore[call-arg]
    return type(root)([*root[: step.key], below, *root[step.key + 1 :]])


def _find(node: Any, wanted: Callable[[Any], bool], place: Place, above: set[int]) -> Iterator[Place]:
    if wanted(node):
        yield place
    elif id(node) not in above:
        for step, child in _children(node):
            yield from _find(child, wanted, (*place, step), above | {id(node)})


def _children(node: Any) -> Iterator[tuple[Step, Any]]:
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        yield from ((Step(name, is_attribute=True), getattr(node, name)) for name in node._fields)
    elif isinstance(node, Mapping):
        yield from ((Step(key, is_attribute=False), child) for key, child in node.items())
    elif isinstance(node, Sequence) and not isinstance(node, (str, bytes)):
        yield from ((Step(index, is_attribute=False), child) for index, child in enumerate(node))
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node) if hasattr(node, field.name)]
        yield from ((Step(name, is_attribute=True), getattr(node, name)) for name in names)
    elif hasattr(node, "opt_state"):
        yield Step("opt_state", is_attribute=True), node.opt_state
