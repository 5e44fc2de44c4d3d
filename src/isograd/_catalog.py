"""Find the entries of a catalogue by walking its folder: one file, one class, one name. Not a plugin system."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any, TypeVar, cast

T = TypeVar("T")


def walk(package: ModuleType, base: type[T]) -> dict[str, type[T]]:
    """The class of every file in `package`, by its kebab-case name, sorted.

    `dead_units.py` must hold `DeadUnits`, a final frozen dataclass below `base` whose fields all have defaults; it is
    known as `dead-units`. Raises ImportError with one sentence at the first file that does not keep to that.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return {name.replace("_", "-"): _entry(package, name, base) for name in names}


def _entry(package: ModuleType, name: str, base: type[T]) -> type[T]:
    module = importlib.import_module(f"{package.__name__}.{name}")
    expected = "".join(word.capitalize() for word in name.split("_"))
    entry: Any = getattr(module, expected, None)
    where = f"{package.__name__}.{name}"
    if not (isinstance(entry, type) and issubclass(entry, base)):
        raise ImportError(f"{where} must hold a class {expected} derived from {base.__name__}")
    if inspect.isabstract(entry):
        left = sorted(vars(entry)["__abstractmethods__"])
        raise ImportError(f"{where}.{expected} does not provide {', '.join(left)}")
    # `__dataclass_fields__` is inherited, so a missing decorator must be looked for in the class's own namespace.
    if not (is_dataclass(entry) and "__dataclass_fields__" in vars(entry) and _is_frozen(entry)):
        raise ImportError(f"{where}.{expected} must be a dataclass(frozen=True, kw_only=True)")
    if not _all_defaulted(entry):
        raise ImportError(f"{where}.{expected} has an option without a default")
    return cast("type[T]", entry)


def _is_frozen(entry: Any) -> bool:
    return bool(entry.__dataclass_params__.frozen)


def _all_defaulted(entry: Any) -> bool:
    parameters = inspect.signature(entry).parameters.values()
    assert len(fields(entry)) >= len(parameters)
    return all(parameter.default is not inspect.Parameter.empty for parameter in parameters)
