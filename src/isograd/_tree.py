"""Nested data as JSON: what batches and arguments of calls look like without their tensors.

    {"tensor": key, …}                a tensor; the framework adds what it needs to make it again (see its own module)
    {"array": key, "dtype": …}        a NumPy array; with "scalar": true a NumPy number
    {"list": [tree, …]}
    {"tuple": [tree, …], "type"?}     with "type": a subclass; with "names": a named tuple's fields
    {"dict": [[tree, tree], …], "type"?}   keys and values; dict, UserDict and their subclasses
    {"fields": [[name, tree], …], "type"}  a dataclass
    {"value": …}                      None, a bool, a number, a string
    {"number": "nan"|"inf"|"-inf"}    a number that JSON has not
    {"opaque": type}                  anything else, which is not kept

A "type" is text such as "collections.OrderedDict": nothing is imported by it. Who decodes may hand over a function that
finds a class by it; without one, and for a name that it does not know, stand-ins with the same fields are made.
"""

from __future__ import annotations

import dataclasses
import math
from collections import UserDict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

Tree = dict[str, Any]

LARGEST = 20_000
"""Nodes of one tree; what is beyond them is opaque. A text batch has some hundred, and 20,000 take about 10 ms."""

DEEPEST = 32
"""Levels of nesting that are kept; batches have two or three. It also ends what contains itself."""

_LONGEST_INTEGER = 1024  # bits; Python refuses to read integers of more than 4300 digits
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class TreeError(ValueError):
    """What was to be decoded is no tree, in one sentence."""


class Named(tuple[Any, ...]):  # noqa: SLOT001 - a tuple has no slot for its names
    """Stands in for a named tuple whose class is not at hand: the same items, also under their names."""

    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: tuple[str, ...], items: list[Any]) -> Named:
        """The tuple of `items`, each of which is an attribute too."""
        made = cls(items)
        made.names = names
        return made

    def __getattr__(self, name: str) -> Any:
        if name in self.names and not name.startswith("__"):
            return self[self.names.index(name)]
        raise AttributeError(f"no field {name!r}, only {', '.join(self.names)}")

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self.names, self, strict=True))


class Fields(SimpleNamespace):
    """Stands in for a dataclass whose class is not at hand."""


# ---- to JSON --------------------------------------------------------------------------------------------------------


def number(value: float) -> float | str:
    """A number as it stands in a capsule: itself, or "nan", "inf" or "-inf"."""
    return value if math.isfinite(value) else _name_of(value)


def number_of(value: Any) -> float:
    """The number that `number` wrote. Raises TreeError for anything else."""
    if isinstance(value, str) and value in _NONFINITE:
        return _NONFINITE[value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise TreeError("no number")


def _name_of(value: float) -> str:
    return "nan" if value != value else "inf" if value > 0 else "-inf"


def type_name(cls: type) -> str:
    """`collections.OrderedDict`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def encode(value: Any, leaf: Callable[[Any], Tree | None] = lambda _: None) -> Tree:
    """`value` as a tree. `leaf(value)`: the tree of what the caller keeps himself (tensors, arrays), None of the rest.

    Calls nothing of the user's but what the attributes of a dataclass may run.
    """
    return _Encoder(leaf).tree(value, 0)


class _Encoder:
    """Counts the nodes of one tree."""

    def __init__(self, leaf: Callable[[Any], Tree | None]) -> None:
        self._leaf, self._nodes = leaf, 0

    def tree(self, value: Any, depth: int) -> Tree:
        self._nodes += 1
        plain = _plain(value)
        if plain is not None:
            return plain
        found = self._leaf(value)
        if found is not None:
            return found
        if depth >= DEEPEST or self._nodes > LARGEST:
            return {"opaque": type_name(type(value))}
        try:
            found = self._container(value, depth + 1)
        except Exception:  # a class of the user's with manners of its own
            found = None
        return found or {"opaque": type_name(type(value))}

    def _container(self, value: Any, depth: int) -> Tree | None:
        if isinstance(value, tuple):
            return self._tuple(value, depth)
        if isinstance(value, list):
            return {"list": [self.tree(item, depth) for item in value]} if self._fits(value) else None
        if isinstance(value, (dict, UserDict)):
            return self._mapping(value, depth)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
            pairs = [[name, self.tree(getattr(value, name), depth)] for name in names]
            return {"fields": pairs, "type": type_name(type(value))}
        return None

    def _tuple(self, value: tuple[Any, ...], depth: int) -> Tree | None:
        if not self._fits(value):
            return None
        tree: Tree = {"tuple": [self.tree(item, depth) for item in value]}
        if type(value) is not tuple:
            tree["type"] = type_name(type(value))
            names = getattr(value, "_fields", None)
            if isinstance(names, tuple) and len(names) == len(value):
                tree["names"] = [str(name) for name in names]
        return tree

    def _mapping(self, value: dict[Any, Any] | UserDict[Any, Any], depth: int) -> Tree | None:
        plain = value.data if isinstance(value, UserDict) else value
        if not self._fits(plain):
            return None
        tree: Tree = {"dict": [[self.tree(key, depth), self.tree(item, depth)] for key, item in dict.items(plain)]}
        return tree if type(value) is dict else {**tree, "type": type_name(type(value))}

    def _fits(self, value: Any) -> bool:
        return self._nodes + len(value) <= LARGEST


def _plain(value: Any) -> Tree | None:
    """The tree of what JSON holds."""
    cls = type(value)
    if value is None or cls is bool or cls is str:
        return {"value": _text(value) if cls is str else value}
    if cls is int:
        return {"value": value} if value.bit_length() <= _LONGEST_INTEGER else None
    if cls is float:
        return {"value": value} if math.isfinite(value) else {"number": _name_of(value)}
    return None


def _text(text: str) -> str:
    """`text` with lone surrogates, which have no UTF-8, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# ---- and back -------------------------------------------------------------------------------------------------------


def decode(
    tree: Any,
    leaf: Callable[[Tree], Any],
    find: Callable[[str], type | None] = lambda _: None,
) -> Any:
    """The data that a tree stands for. `leaf(tree)`: the tensor, array or opaque thing of such a node; `find(type)`: a
    class that the caller trusts, called with the items of a tuple, the pairs of a mapping or the fields by name.

    Raises TreeError where the tree is none.
    """
    return _decoded(tree, leaf, find, 0)


def _decoded(tree: Any, leaf: Callable[[Tree], Any], find: Callable[[str], type | None], depth: int) -> Any:
    if not isinstance(tree, dict) or depth > DEEPEST:
        raise TreeError("a tree is nested too deeply" if isinstance(tree, dict) else "no tree")

    def down(item: Any) -> Any:
        return _decoded(item, leaf, find, depth + 1)

    cls = find(tree["type"]) if isinstance(tree.get("type"), str) else None
    if "value" in tree:
        return _scalar(tree["value"])
    if "number" in tree:
        return number_of(tree["number"])
    if "list" in tree:
        return [down(item) for item in _items(tree["list"])]
    if "tuple" in tree:
        return _tuple_of([down(item) for item in _items(tree["tuple"])], tree, cls)
    if "dict" in tree:
        pairs = [(_hashable(down(key)), down(item)) for key, item in _pairs(tree["dict"])]
        return dict(pairs) if cls is None else cls(dict(pairs))
    if "fields" in tree:
        named = {str(name): down(item) for name, item in _pairs(tree["fields"])}
        return (cls or Fields)(**named)
    return leaf(tree)


def _tuple_of(items: list[Any], tree: Tree, cls: Any) -> Any:
    names = tree.get("names")
    if names is None:
        return tuple(items) if cls is None else cls(items)
    if not isinstance(names, list) or len(names) != len(items) or not all(isinstance(name, str) for name in names):
        raise TreeError("a named tuple has other names than items")
    return Named.of(tuple(names), items) if cls is None else cls(*items)


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TreeError("a value is neither number nor text")


def _items(items: Any) -> list[Any]:
    if not isinstance(items, list):
        raise TreeError("a list has no items")
    return items


def _pairs(pairs: Any) -> Iterator[tuple[Any, Any]]:
    for pair in _items(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise TreeError("a mapping has no pairs")
        yield pair[0], pair[1]


def _hashable(key: Any) -> Any:
    try:
        hash(key)
    except TypeError:
        raise TreeError("a mapping has a key that is none") from None
    return key


def keys_in(tree: Any) -> Iterator[str]:
    """The names of the tensors and arrays of a tree, or of trees in lists and mappings. Takes anything."""
    pending = [tree]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            for kind in ("tensor", "array"):
                if isinstance(value.get(kind), str):
                    yield value[kind]
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
