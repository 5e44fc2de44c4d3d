"""For whoever writes a rule: histories to try it on, and the contract that it must keep.

    from isograd.testing import altered, check_rule, plain_network

    sick = altered(plain_network(depth=8), dead_fraction=lambda values: values * 0 + 1)
    check_rule(MyRule, fires=[sick], silent=[plain_network()])

Every function raises AssertionError with a sentence, so it works under any test runner.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import ArrayLike

from isograd._history import Event, Floats, History, Layer, Parameter, Series
from isograd._rule import LEVELS, STAGES, Finding, Rule
from isograd._statistics import STATISTICS
from isograd._theory import BOUNDED, critical_std, mean_square, mean_square_slope

SECTIONS = ("Detects", "Why it matters", "Decided by", "Stays silent when", "Remedies", "References")
"""What the docstring of every rule must have, in this order."""

Change = ArrayLike | Callable[[Floats], ArrayLike]


# ---- histories ------------------------------------------------------------------------------------------------------


def plain_network(
    *, depth: int = 4, activation: str = "relu", steps: int = 100, width: int = 64, classes: int = 10, seed: int = 0
) -> History:
    """A history of a plain network that learns to classify, with every statistic at a plausible value.

    Layers, in order: the input, `depth` pairs of a linear layer and an activation, the linear head, the prediction,
    the target. Weights are critical, so the signal keeps its size over depth; the loss falls from ln(classes) to a
    hundredth.
    """
    rng = default_rng(seed)
    layers, parameters = _layers(depth, activation, width, classes), _parameters(depth, width, classes)
    stamps = np.arange(steps)
    decay = np.exp(-stamps / max(1.0, steps / 5))
    loss = np.log(classes) * (0.99 * decay + 0.01) * np.exp(0.03 * rng.standard_normal(steps))
    series = dict(_step_series(stamps, loss))
    series |= _parameter_series(stamps, loss, parameters, rng)
    series |= _layer_series(stamps, loss, layers, rng)
    return History(
        layers=layers,
        parameters=parameters,
        groups=({"optimizer": "SGD", "lr": 0.1},),
        series={name: Series(stamps, values) for name, values in series.items()},
    )


def _layers(depth: int, activation: str, width: int, classes: int) -> tuple[Layer, ...]:
    hidden = [
        layer
        for i in range(depth)
        for layer in (
            Layer(
                name=f"linear{i}",
                kind="linear",
                type="Linear",
                units=width,
                fan_in=width,
                fan_out=width,
                position=2 * i + 1,
            ),
            Layer(name=f"act{i}", kind=activation, type=activation, units=width, position=2 * i + 2),
        )
    ]
    end = 2 * depth + 1
    return (
        Layer(name="input", kind="input", type="float32", role="input", units=width, position=0),
        *hidden,
        Layer(name="head", kind="linear", type="Linear", units=classes, fan_in=width, fan_out=classes, position=end),
        Layer(name="prediction", kind="prediction", role="prediction", units=classes, position=end + 1),
        Layer(name="target", kind="target", type="int64", role="target", position=end + 2),
    )


def _parameters(depth: int, width: int, classes: int) -> tuple[Parameter, ...]:
    shapes = [(f"linear{i}", width) for i in range(depth)] + [("head", classes)]
    return tuple(
        parameter
        for name, rows in shapes
        for parameter in (
            Parameter(name=f"{name}.weight", layer=name, shape=(rows, width)),
            Parameter(name=f"{name}.bias", layer=name, shape=(rows,)),
        )
    )


def _step_series(stamps: np.ndarray[Any, np.dtype[np.int64]], loss: Floats) -> Iterator[tuple[str, Floats]]:
    ones = np.ones(len(stamps))
    yield "loss", loss
    yield "global_grad_norm", loss
    yield "global_grad_norm_unclipped", loss
    for name in ("clip_factor", "micro_batches", "loss_scale"):
        yield name, ones
    for name in ("loss_nonfinite", "skipped", "carried_grad_norm"):
        yield name, 0 * ones
    yield "graph_nodes", 60 * ones
    yield "learning_rate", 0.1 * ones[:, None]


def _parameter_series(
    stamps: np.ndarray[Any, np.dtype[np.int64]], loss: Floats, parameters: Sequence[Parameter], rng: Generator
) -> dict[str, Floats]:
    shape = (len(stamps), len(parameters))
    gradient = 0.3 * loss[:, None] * np.exp(0.1 * rng.standard_normal(shape))
    size = np.array([p.size for p in parameters], dtype=float)
    std = np.array([critical_std("relu", p.shape[-1]) for p in parameters])
    weights = np.tile(std * np.sqrt(size), (len(stamps), 1))
    update = np.full(shape, 1e-3) * np.exp(0.1 * rng.standard_normal(shape))
    return {
        "grad_norm": gradient,
        "grad_max": gradient / 10,
        "weight_norm": weights,
        "update_ratio": update,
        "update_norm": update * weights,
        "unit_spread": np.ones(shape) * np.where([len(p.shape) > 1 for p in parameters], 1.0, np.nan),
        **{
            name: np.zeros(shape)
            for name in ("grad_nonfinite", "grad_zero_fraction", "weight_nonfinite", "state_nonfinite")
        },
    }


_DISTINCT = {"input": 64.0, "target": 10.0}
"""Different rows of a batch: every input, and every class among the targets."""


def _layer_series(
    stamps: np.ndarray[Any, np.dtype[np.int64]], loss: Floats, layers: Sequence[Layer], rng: Generator
) -> dict[str, Floats]:
    shape = (len(stamps), len(layers))
    active = np.array([layer.kind not in ("linear", "input", "prediction", "target") for layer in layers])
    bounded = np.array([layer.kind in BOUNDED for layer in layers])
    computed = np.array([layer.role == "module" for layer in layers])
    kind = next((layer.kind for layer, is_active in zip(layers, active, strict=True) if is_active), "identity")
    rms = np.where(active, np.sqrt(mean_square(kind, 1.0)), 1.0)
    slope = np.where(active, np.sqrt(mean_square_slope(kind, 1.0)), np.nan)
    signal = 0.02 * loss[:, None] * np.where(computed, 1.0, np.nan) * np.exp(0.05 * rng.standard_normal(shape))
    everywhere = np.ones(shape)
    return {
        "output_rms": everywhere * rms,
        "output_mean": everywhere * np.where(active, 0.3, 0.0),
        "output_std": everywhere * rms,
        "output_min": -3 * everywhere,
        "output_max": 3 * everywhere,
        "output_zero_fraction": everywhere * np.where(active & ~bounded, 0.5, 0.0),
        "output_nonfinite": 0 * everywhere,
        "input_nonfinite": 0 * everywhere,
        "output_size": 6400 * everywhere,
        "calls": everywhere,
        "dead_fraction": everywhere * np.where(active & ~bounded, 0.05, np.nan),
        "saturation": everywhere * np.where(bounded, 0.02, np.nan),
        "activation_slope": everywhere * slope,
        "signal_norm": signal,
        "signal_max": signal / 10,
        "signal_nonfinite": 0 * everywhere,
        "signal_zero_fraction": everywhere * np.where(computed, 0.1, np.nan),
        "row_similarity": everywhere * np.where(computed, 0.3, np.nan),
        **dict.fromkeys(("batch_statistics_gap", "attention_entropy", "attention_logit_max"), np.nan * everywhere),
        "distinct_values": everywhere * np.array([_DISTINCT.get(layer.role, np.nan) for layer in layers]),
        "column_scale_ratio": everywhere * np.where([layer.role == "input" for layer in layers], 1.5, np.nan),
    }


def altered(history: History, **changes: Change) -> History:
    """The same history with other values: statistic -> array, or a function from the old values to the new.

    A statistic that was not there starts as NaN in the shape of its axis. Steps stay as they are.
    """
    series = dict(history.series)
    for name, change in changes.items():
        old = series.get(name) or _absent(history, name)
        values = change(np.array(old.values)) if callable(change) else change
        series[name] = Series(old.steps, np.broadcast_to(np.asarray(values, dtype=float), old.values.shape))
    return replace(history, series=series)


def _absent(history: History, name: str) -> Series:
    steps = next(iter(history.series.values())).steps
    width = {"layer": len(history.layers), "parameter": len(history.parameters), "group": len(history.groups)}
    axis = STATISTICS[name].axis
    return Series(steps, np.full((len(steps), width[axis]) if axis in width else len(steps), np.nan))


def relabeled(history: History, prefix: str) -> History:
    """The same history with `prefix` before every name of a layer and of a parameter."""
    return replace(
        history,
        layers=tuple(replace(layer, name=prefix + layer.name) for layer in history.layers),
        parameters=tuple(
            replace(p, name=prefix + p.name, layer=prefix + p.layer if p.layer else "") for p in history.parameters
        ),
        profiles={
            name: {prefix + layer: series for layer, series in calls.items()}
            for name, calls in history.profiles.items()
        },
        events=tuple(_relabeled_event(event, prefix) for event in history.events),
    )


def _relabeled_event(event: Event, prefix: str) -> Event:
    named = {
        key: prefix + value if key in ("name", "parameter", "module") else value for key, value in event.data.items()
    }
    return replace(event, layer=prefix + event.layer if event.layer else event.layer, data=named)


def loss_rescaled(history: History, factor: float) -> History:
    """What would have been measured had the loss been multiplied by `factor` under an optimizer that ignores scale."""
    units = {
        name
        for name, statistic in STATISTICS.items()
        if statistic.unit == "loss" or statistic.unit.startswith("loss /")
    }
    return altered(history, **{name: (lambda values: values * factor) for name in units & set(history.series)})


def continued(history: History, steps: int = 50) -> History:
    """The same history with healthy steps after it: the readings of its first row, no counts of non-finite values."""

    def longer(name: str, series: Series) -> Series:
        calm = (
            np.zeros_like(series.values[:1]) if name.endswith("nonfinite") or name == "skipped" else series.values[:1]
        )
        stamps = series.steps[-1] + 1 + np.arange(steps)
        return Series(
            np.concatenate([series.steps, stamps]), np.concatenate([series.values, np.repeat(calm, steps, axis=0)])
        )

    return replace(history, series={name: longer(name, s) if len(s) else s for name, s in history.series.items()})


def random_history(seed: int) -> History:
    """Any shape and value that an observer might write: no layers or one, NaN, infinities, zeros, gaps, no step."""
    rng = default_rng(seed)
    steps = int(rng.choice([0, 1, 2, 3, 8, 40, 150]))
    network = plain_network(
        depth=int(rng.integers(0, 7)),
        activation=str(rng.choice(["relu", "tanh", "sigmoid", "gelu"])),
        steps=max(steps, 1),
        seed=seed,
    )
    keep = rng.choice([0, 1, 2, len(network.layers)])
    layers, parameters = network.layers[:keep], network.parameters[:keep]
    width = {"layer": len(layers), "parameter": len(parameters), "group": len(network.groups)}
    series = {}
    for name, old in network.series.items():
        rows = np.flatnonzero(rng.random(len(old)) < rng.choice([0.2, 1.0]))[:steps]
        columns = width.get(STATISTICS[name].axis)
        values = old.values[rows] if columns is None else old.values[rows][:, :columns]
        if rng.random() < 0.9:
            series[name] = Series(old.steps[rows], _disturbed(values, rng, counts=STATISTICS[name].unit == "count"))
    return replace(network, layers=layers, parameters=parameters, series=series)


def _disturbed(values: Floats, rng: Generator, *, counts: bool) -> Floats:
    how = rng.integers(0, 8)
    if how < 3:
        return values
    odd = rng.choice([np.nan, 0.0, 1.0, 1e6] if counts else [np.nan, np.inf, -np.inf, 0.0, 1e-300, 1e300, -1.0, 1e6])
    if how == 3:
        return np.full(values.shape, odd)
    return np.where(rng.random(values.shape) < rng.choice([0.05, 0.5]), odd, values)


# ---- the contract ---------------------------------------------------------------------------------------------------


def check_rule(
    rule: type[Rule],
    *,
    fires: Iterable[History] = (),
    silent: Iterable[History] = (),
    seeds: Iterable[int] = range(40),
    factors: Sequence[float] = (2.0**-10, 2.0**10),
) -> None:
    """Raise AssertionError, with a sentence, unless `rule` keeps the contract of `isograd._rule.Rule`.

    It must describe itself, stay silent where nothing was measured, judge any history without raising, cite only what
    exists, with evidence beyond its limit, read only what it declares, and give the same answer twice and under other
    names. On each of `fires` it must find something, and the same when the loss is multiplied by each of `factors`
    (none for a rule that knows losses by their absolute value); on each of `silent` nothing at warning or above.
    """
    check_description(rule)
    assert not check_findings(rule, History()), f"{rule.rule_name()} finds something in an empty history"
    for seed in seeds:
        check_findings(rule, random_history(seed))
    for history in fires:
        found = check_findings(rule, history)
        assert found, f"{rule.rule_name()} is silent where it should fire"
        for factor in factors:
            again = check_findings(rule, loss_rescaled(history, factor))
            assert _levels(again) == _levels(found), f"{rule.rule_name()} changes its mind when the loss is rescaled"
    for history in silent:
        alarms = [finding for finding in check_findings(rule, history) if finding.level != "info"]
        assert not alarms, f"{rule.rule_name()} fires on a healthy history: {alarms[0].message}"


def check_description(rule: type[Rule]) -> None:
    """Raise AssertionError unless the class is a frozen dataclass with a page of its own and names what it reads."""
    name = rule.rule_name()
    described: Any = rule
    assert is_dataclass(described), f"{name} is no dataclass"
    for option in fields(described):
        assert isinstance(option.default, (int, float)), f"{name}: option {option.name} has no number as its default"
        assert option.kw_only, f"{name}: option {option.name} can be given by position"
        mentioned = re.search(rf"\b{option.name}\b", rule.__doc__ or "")
        assert mentioned, f"{name}: the page does not mention the option {option.name}"
    lines = [line.strip() for line in (rule.__doc__ or "").splitlines()]
    found = [line for line in lines if line in SECTIONS]
    assert found == list(SECTIONS), f"{name}: the page must have the sections {', '.join(SECTIONS)}, in this order"
    assert rule.stage in STAGES, f"{name}: {rule.stage!r} is no stage"
    unknown = [statistic for statistic in (*rule.needs, *rule.uses) if statistic not in STATISTICS]
    assert not unknown, f"{name} reads {unknown}, which no statistic is called"
    assert not set(rule.needs) & set(rule.uses), f"{name} lists a statistic as needed and as optional"
    assert rule.stage == "symptom" or rule.explains, f"{name} is a cause that explains nothing"


def check_findings(rule: type[Rule], history: History) -> list[Finding]:
    """What `rule` finds in `history`, once checked: twice the same, only what exists and is beyond its limit."""
    if not all(len(history.series.get(name, ())) for name in rule.needs):
        return []
    # As the engine does: readings of a broken run reach the ends of float64.
    with np.errstate(all="ignore"):
        return _checked_findings(rule, history)


def _checked_findings(rule: type[Rule], history: History) -> list[Finding]:
    found = list(rule().check(_tracked(history, rule)))
    assert repr(found) == repr(list(rule().check(history))), f"{rule.rule_name()} does not give the same answer twice"
    for finding in found:
        check_finding(rule, history, finding)
    renamed = list(rule().check(relabeled(history, "net.")))
    expected = [tuple("net." + name for name in finding.layers) for finding in found]
    assert [f.layers for f in renamed] == expected, f"{rule.rule_name()} depends on the names of layers"
    return found


def check_finding(rule: type[Rule], history: History, finding: Finding) -> None:
    """Raise AssertionError unless a finding is one of this rule about this history."""
    name, last = rule.rule_name(), max(history.num_steps - 1, 0)
    known = {layer.name for layer in history.layers} | {parameter.name for parameter in history.parameters}
    assert finding.name == name, f"{name} signs a finding as {finding.name}"
    assert finding.subject == history.subject, f"{name} speaks of the subject {finding.subject}"
    assert finding.level in LEVELS, f"{name} gives the level {finding.level!r}"
    assert 0 <= finding.confidence <= 1, f"{name} is confident by {finding.confidence}"
    assert 0 <= finding.first_step <= finding.last_step <= last, f"{name} names steps that were not seen: {finding}"
    assert set(finding.layers) <= known, f"{name} names layers that there are not: {set(finding.layers) - known}"
    assert finding.evidence, f"{name} gives no evidence"
    assert re.search(r"\d", finding.message), f"{name} gives no number: {finding.message}"
    for evidence in finding.evidence:
        assert evidence.breached, f"{name} cites evidence within its limit: {evidence}"
        assert 0 <= evidence.step <= last, f"{name} cites a step that was not seen: {evidence}"
        assert evidence.layer is None or evidence.layer in known, f"{name} cites a layer that there is not: {evidence}"


def check_severity(rule: type[Rule], histories: Iterable[History]) -> None:
    """Raise AssertionError unless the level never falls along `histories`, from the mildest fault to the worst."""
    levels = [max((LEVELS.index(f.level) for f in check_findings(rule, history)), default=-1) for history in histories]
    assert levels == sorted(levels), f"{rule.rule_name()} takes a worse fault less seriously: {levels}"


def _levels(findings: Iterable[Finding]) -> list[tuple[str, int]]:
    return [(finding.level, finding.first_step) for finding in findings]


class _Tracked(Mapping[str, Any]):
    """A mapping that lets through only the names that a rule declares."""

    def __init__(self, inner: Mapping[str, Any], rule: type[Rule]) -> None:
        self._inner, self._rule = inner, rule

    def _allowed(self, name: str) -> str:
        declared = (*self._rule.needs, *self._rule.uses)
        assert name in declared, f"{self._rule.rule_name()} reads {name} without declaring it"
        return name

    def __getitem__(self, name: str) -> Any:
        return self._inner[self._allowed(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def values(self) -> ValuesView[Any]:
        """All series, whatever their names: how many steps a run had is no reading of a statistic."""
        return self._inner.values()

    def __len__(self) -> int:
        return len(self._inner)


def _tracked(history: History, rule: type[Rule]) -> History:
    watched = replace(history)
    object.__setattr__(watched, "series", _Tracked(history.series, rule))
    object.__setattr__(watched, "profiles", _Tracked(history.profiles, rule))
    return watched
