"""What a loop trains, as if it were one model of Keras, and the names of its variables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import keras

from isograd.frameworks.keras import _describe as describe


class Program:
    """What is trained, as if it were one model."""

    train_function = None
    jit_compile = False
    _trainable_variables = ()

    def __init__(self, roots: Sequence[Any]) -> None:
        self.roots, self.loss = roots, None

    def _flatten_layers(self, include_self: bool = False, recursive: bool = True) -> Iterator[Any]:
        for root in self.roots:
            yield from root._flatten_layers(include_self=True)


def key(variable: Any) -> Any:
    """What two handles of one variable share."""
    if isinstance(variable, keras.Variable):
        variable = variable._value
    return getattr(variable, "_unique_id", id(variable))


def named(variables: Sequence[Any], roots: Sequence[Any]) -> tuple[tuple[str, str, Any], ...]:
    """(name, its layer, variable) of what a step trains, and of what is frozen beside it."""
    known = {key(v): (name, owner, v) for name, owner, v in describe.variables_of(Program(roots))}
    found, taken = [], {name for name, _, _ in known.values()}
    for variable in variables:
        name, owner, _ = known.pop(key(variable), ("", "", None))
        if not name:
            plain = str(getattr(variable, "path", variable.name)).removesuffix(":0")
            name, number = plain, 2
            while name in taken:
                name, number = f"{plain}-{number}", number + 1
            owner = name.rpartition("/")[0]
            taken.add(name)
        found.append((name, owner, variable))
    return (*found, *known.values())
