"""Where settings come from: defaults < `[tool.isograd]` of the nearest pyproject.toml < `ISOGRAD_*` < arguments.

It reads and checks values; it does not act on them. Every mistake is a `ValueError` of one sentence that names the
file (or the environment) and the key.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isograd._rule import Options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run of isograd was asked to do.

    `out`: folder that holds the run folders. `every`: steps between deep readings once the first, denser ones are
    over. `budget`: share of wall time that watching is allowed to cost, 0.01 is 1 %. `steps`: stop after so many
    optimizer steps, None for never. `seed`: seed every generator with it, None to leave them alone. `rules`: options
    of rules, by name. `enabled`: False with `ISOGRAD=off`, which switches everything off.
    """

    out: Path = Path("isograd-runs")
    every: int = 100
    budget: float = 0.01
    steps: int | None = None
    seed: int | None = None
    rules: Options = field(default_factory=dict)
    enabled: bool = True


def load_settings(
    *, folder: Path | None = None, environment: Mapping[str, str] | None = None, **arguments: Any
) -> Settings:
    """The settings in force in `folder` (the current one by default); an argument that is None was not given.

    Raises ValueError for an unknown key or an ill value, wherever it stands.
    """
    environment = os.environ if environment is None else environment
    if not _enabled(environment):
        return Settings(enabled=False)
    settings = Settings()
    given = {key: value for key, value in arguments.items() if value is not None}
    for source, values in (*_sources(folder or Path.cwd(), environment), ("the arguments", given)):
        settings = replace(settings, **{key: _checked(key, value, source) for key, value in values.items()})
    return settings


def nearest(name: str, names: Iterable[str], *, otherwise: str = "") -> str:
    """The end of a sentence: `; did you mean a or b?` if known names look like `name`, else `otherwise` and a stop."""
    close = get_close_matches(name, list(names), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else f"{otherwise}."


def _enabled(environment: Mapping[str, str]) -> bool:
    switch = environment.get("ISOGRAD", "").strip().lower()
    if switch not in ("", "on", "off"):
        raise ValueError(f"ISOGRAD in the environment is {switch!r}, but must be on or off.")
    return switch != "off"


def _sources(folder: Path, environment: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    pyproject = next((p for f in (folder, *folder.parents) if (p := f / "pyproject.toml").is_file()), None)
    if pyproject is not None:
        yield str(pyproject), _read_pyproject(pyproject)
    yield "the environment", _read_environment(environment)


def _read_pyproject(path: Path) -> dict[str, Any]:
    try:
        tool = tomllib.loads(path.read_text(encoding="utf-8")).get("tool")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    table = tool.get("isograd", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        raise ValueError(f"{path}: tool.isograd must be a table, not {table!r}.")
    # A folder in a file is relative to the file, so that it means the same wherever a command is typed.
    return {
        key: path.parent / value if key == "out" and isinstance(value, str) else value for key, value in table.items()
    }


def _read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    prefix = "ISOGRAD_"
    values = {name[len(prefix) :].lower(): text for name, text in environment.items() if name.startswith(prefix)}
    if "rules" in values:
        raise ValueError(
            "ISOGRAD_RULES in the environment is not a setting: options of rules belong in pyproject.toml."
        )
    return dict(values)


def _checked(key: str, value: Any, source: str) -> Any:
    spelled = f"ISOGRAD_{key.upper()}" if source == "the environment" else key
    if key == "rules":
        return _rule_options(value, source)
    if key not in _READERS:
        settings = nearest(key, _READERS, otherwise=f"; settings are {', '.join(_READERS)} and rules")
        raise ValueError(f"{spelled} in {source} is not a setting{settings}")
    reader, wanted = _READERS[key]
    try:
        return reader(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{spelled} in {source} is {value!r}, but must be {wanted}.") from None


def _path(value: Any) -> Path:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise TypeError
    return Path(value)


def _whole(least: int, most: int = sys.maxsize) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool | float):
            raise TypeError
        number = int(value)
        if not least <= number <= most:
            raise ValueError
        return number

    return read


def _fraction(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or math.isnan(number) or number <= 0:
        raise ValueError
    return number


# `budget` has no upper bound: infinity means that every reading is taken whatever it costs.
_READERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "out": (_path, "a folder"),
    "every": (_whole(1), "a whole number of steps, 1 or more"),
    "budget": (_fraction, "a share of wall time above 0, such as 0.01"),
    "steps": (_whole(1), "a whole number of steps, 1 or more"),
    # NumPy's generator takes 32 bits, the narrowest of those that are seeded.
    "seed": (_whole(0, 2**32 - 1), "a whole number from 0 to 4294967295"),
}


def _rule_options(tables: Any, source: str) -> Options:
    """`[tool.isograd.rules.<name>]`, checked against the fields of the rules' dataclasses."""
    # Imported here: the catalogue brings NumPy, which a script that is to be run has a right to import first, with the
    # thread counts that it puts into the environment. Only options of rules are worth knowing before that.
    from isograd.rules import RULES

    if not isinstance(tables, dict):
        raise ValueError(f"rules in {source} is {tables!r}, but must be a table of rules.")
    for name, options in tables.items():
        if name not in RULES:
            raise ValueError(f"rules.{name} in {source} names no rule{nearest(name, RULES)}")
        if not isinstance(options, dict):
            raise ValueError(f"rules.{name} in {source} is {options!r}, but must be a table of options.")
        _check_fields(name, options, RULES[name], source)
    return {name: dict(options) for name, options in tables.items()}


def _check_fields(name: str, options: Mapping[str, Any], rule: type, source: str) -> None:
    defaults = {f.name: f.default for f in fields(rule) if f.default is not MISSING}
    for option, value in options.items():
        where = f"rules.{name}.{option} in {source}"
        if option not in defaults:
            raise ValueError(
                f"{where} is not an option of {name}{nearest(option, defaults, otherwise=_listed(defaults))}"
            )
        if not _fits(value, defaults[option]):
            raise ValueError(
                f"{where} is {value!r}, but must be a {type(defaults[option]).__name__} like {defaults[option]!r}."
            )


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, type(default))


def _listed(defaults: Mapping[str, Any]) -> str:
    return f"; its options are {', '.join(defaults)}" if defaults else "; it has none"
