"""The scoreboard as text: lines for the terminal, Markdown for RESULTS.md and the README. It counts nothing itself."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

from baselines import BASELINES
from catalog import PROGRAMS, Case
from judge import Outcome
from scoreboard import (
    Bin,
    Score,
    baseline_score,
    calibration,
    calibration_by_cause,
    confusion,
    given,
    is_right,
    score,
)

BEGIN, END = "<!-- make cases writes this table -->", "<!-- end of the table -->"
Cases = Mapping[str, Case]
FAMILIES = ("data", "loop", "initialization", "architecture", "output", "optimizer", "numerics", "symptom", "silent")


def lines(outcomes: Sequence[Outcome], cases: Cases) -> str:
    """One line a run for the terminal: how it was judged, when, and what was said."""
    return "\n".join(
        f"{outcome.seed} {outcome.case:38s} {outcome.variant:8s} {_mark(outcome, cases[outcome.case]):8s}"
        f"{outcome.alarm_after or '-':>5} {outcome.steps:5d}  {_said(outcome)}{_note(outcome, cases[outcome.case])}"
        for outcome in outcomes
    )


def summary(outcomes: Sequence[Outcome], cases: Cases) -> str:
    """One line per seed, and one for all of them."""
    seeds = sorted({outcome.seed for outcome in outcomes})
    found = {f"seed {seed}": [outcome for outcome in outcomes if outcome.seed == seed] for seed in seeds}
    rows = [*found.items(), *([("all", outcomes)] if len(seeds) > 1 else [])]
    return "\n".join(f"{name}: {_sentence(score(part, cases))}" for name, part in rows)


def readme(outcomes: Sequence[Outcome], cases: Cases) -> str:
    """The table of the README."""
    text = f"{_programs(outcomes, cases)}. [cases/RESULTS.md](cases/RESULTS.md) has every program."
    return f"{text}\n\n{_comparison(outcomes, cases)}"


def replaced(text: str, table: str) -> str:
    """`text` with `table` between its markers; unchanged without them."""
    if BEGIN not in text or END not in text:
        return text
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n{table}\n{END}{text.partition(END)[2]}"


def document(outcomes: Sequence[Outcome], cases: Cases) -> str:
    """RESULTS.md."""
    parts = [
        "# What isograd says of programs whose faults are known",
        f"Written by `{'make cases-keras' if _is_keras(cases) else 'make cases'}`: {_programs(outcomes, cases)}.",
        *([_BACKENDS] if _is_keras(cases) else []),
        _comparison(outcomes, cases),
        _EXPLANATION,
        f"## Per seed\n\n{_per_seed(outcomes, cases)}",
        f"## Time to the first alarm\n\n{_times(outcomes, cases)}",
        f"## Confidence\n\n{_calibration(outcomes, cases)}",
        f"## Confusion by family\n\n{_confusion(outcomes, cases)}",
        f"## Faulty programs\n\n{_faulty(outcomes, cases)}",
        f"## Alarms about fixed and healthy programs\n\n{_noise(outcomes)}",
        _machine(cases),
    ]
    return "\n\n".join(parts) + "\n"


def frameworks(cases: Cases) -> tuple[str, ...]:
    """The distributions that the programs run on."""
    return ("keras", "tensorflow-cpu", "jax") if _is_keras(cases) else ("torch",)


def _machine(cases: Cases) -> str:
    versions = [f"{name} {version(name)}" for name in ("isograd", *frameworks(cases))]
    python = f"Python {platform.python_version()}"
    return f"## Machine\n\n- {', '.join([*versions, python, platform.machine()])}, {os.cpu_count()} cores"


def _is_keras(cases: Cases) -> bool:
    return any(case.backend for case in cases.values())


_BACKENDS = """\
They run on TensorFlow, but for those marked otherwise. On TensorFlow, Keras computes a cross-entropy of a softmax or
sigmoid from what had entered it: there, these faults do no harm to the training."""

_EXPLANATION = """\
*Detected*: a faulty program gets a cause at level warning or error. *Silent*: the fixed program gets none. *Pair
right*: both. *First cause*, *first three*: an accepted cause of the fault is the first alarm, or among the first three;
for faults that turn out harmless only if no alarm is an error. *Median steps*: steps seen when the first alarm
is given, over detected programs: the record is cut after 1, 2, 3, 5, 10 … steps, diagnosed as if the run ended there,
and the gap before the first alarm is halved until the step is known (that the run is too short is no alarm before its
end). *Never an alarm*: fixed and healthy programs of which no such cut gave an alarm, as somebody who watches the run
would see it.

The baselines are what published rules say of the same recorded runs. They name no cause. `baselines.py` has each rule,
its source, and what stands in for quantities that the run file does not hold."""


def _programs(outcomes: Sequence[Outcome], cases: Cases) -> str:
    pairs = sum(bool(case.accepted) for case in cases.values())
    seeds = len({outcome.seed for outcome in outcomes})
    return (
        f"{pairs} training programs with a fault that users reported, each with the repair that was accepted, and "
        f"{len(cases) - pairs} healthy programs that look alarming, with {seeds} seeds each"
    )


def _comparison(outcomes: Sequence[Outcome], cases: Cases) -> str:
    ours = score(outcomes, cases)
    rows = [_row("isograd", ours, names=True)]
    rows += [_row(name, baseline_score(outcomes, name), names=False) for name in BASELINES]
    header = (
        "", "detected", "silent on the fixed twin", "pair right", "healthy programs silent", "never an alarm",
        "first cause right", "among the first three", "median steps",
    )  # fmt: skip
    return _table(header, rows)


def _row(name: str, found: Score, *, names: bool) -> list[str]:
    return [
        name,
        _percent(found.detected, found.faulty),
        _percent(found.silent, found.fixed),
        _percent(found.pairs, found.faulty),
        _percent(found.controls_silent, found.controls),
        _percent(found.calm, found.fixed + found.controls),
        _percent(found.top1, found.faulty) if names else "–",
        _percent(found.top3, found.faulty) if names else "–",
        "–" if found.median_steps is None else f"{found.median_steps:g}",
    ]


def _per_seed(outcomes: Sequence[Outcome], cases: Cases) -> str:
    rows = []
    for seed in sorted({outcome.seed for outcome in outcomes}):
        found = score([outcome for outcome in outcomes if outcome.seed == seed], cases)
        rows.append(
            [
                str(seed),
                f"{found.detected}/{found.faulty}",
                f"{found.silent}/{found.fixed}",
                f"{found.top1}/{found.faulty}",
                f"{found.top3}/{found.faulty}",
                f"{found.controls_silent}/{found.controls}",
            ]
        )
    return _table(("seed", "detected", "silent", "first cause", "first three", "healthy silent"), rows)


def _times(outcomes: Sequence[Outcome], cases: Cases) -> str:
    """How many steps were seen at the first alarm, by family of the fault."""
    after: dict[str, list[tuple[int, int]]] = {}
    for outcome in outcomes:
        if outcome.variant == "faulty" and outcome.alarms and outcome.alarm_after:
            family = next(iter(confusion([outcome], cases)))
            after.setdefault(family, []).append((outcome.alarm_after, outcome.steps))
    rows = [
        [
            family,
            str(len(found)),
            *(str(_quantile([steps for steps, _ in found], q)) for q in (0.5, 0.9)),
            f"{_quantile([100 * steps / whole for steps, whole in found], 0.5):.0f} %",
        ]
        for family in FAMILIES
        if (found := after.get(family))
    ]
    return _table(("fault", "runs", "median steps", "90 % within", "median share of the run"), rows)


def _calibration(outcomes: Sequence[Outcome], cases: Cases) -> str:
    entries = given(outcomes, cases)
    firsts = [entry for entry in entries if entry.place == 1]
    header = ("confidence", "mean", "given", "right", "share", "in fixed or healthy programs")
    return "\n\n".join(
        [
            "Causes at level warning or above, of all programs; right are accepted causes of faulty programs.",
            _table(header, [_bin_row(f"{row.low:g}–{row.high:g}", row) for row in calibration(entries)]),
            "Of these, what was named first:",
            _table(header, [_bin_row(f"{row.low:g}–{row.high:g}", row) for row in calibration(firsts)]),
            "By cause:",
            _table(header, [_bin_row(name, row) for name, row in calibration_by_cause(entries).items()]),
        ]
    )


def _bin_row(name: str, row: Bin) -> list[str]:
    share = f"{row.right / row.count:.2f}"
    return [name, f"{row.mean_confidence:.2f}", str(row.count), str(row.right), share, str(row.on_healthy)]


def _confusion(outcomes: Sequence[Outcome], cases: Cases) -> str:
    found = confusion(outcomes, cases)
    columns = [family for family in FAMILIES if any(counts[family] for counts in found.values())]
    order = [family for family in (*FAMILIES, "no such rule") if family in found]
    rows = [[family, *(str(found[family][column] or "") for column in columns)] for family in order]
    return f"Rows: the fault. Columns: what was named first.\n\n{_table(('', *columns), rows)}"


def _faulty(outcomes: Sequence[Outcome], cases: Cases) -> str:
    by_case: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.variant == "faulty":
            by_case.setdefault(outcome.case, []).append(outcome)
    rows = [
        [
            _link(cases[name]),
            ", ".join(cases[name].accepted),
            " ".join(_mark(outcome, cases[name]) for outcome in found),
            " ".join(str(outcome.alarm_after or "–") for outcome in found),
            "; ".join(dict.fromkeys(_names(outcome) or "–" for outcome in found)),
        ]
        for name, found in by_case.items()
    ]
    return _table(("program", "accepted", "per seed", "steps seen", "named"), rows)


def _link(case: Case) -> str:
    link = f"[{case.name}]({case.script.relative_to(PROGRAMS.parent).as_posix()})"
    return f"{link} on {case.backend}" if case.backend not in {"", "tensorflow"} else link


def _noise(outcomes: Sequence[Outcome]) -> str:
    rows = [
        [
            outcome.case,
            outcome.variant,
            str(outcome.seed),
            _names(outcome) or "– (before the end)",
            str(outcome.alarm_after),
        ]
        for outcome in outcomes
        if outcome.variant != "faulty" and (outcome.alarms or outcome.alarm_after)
    ]
    return _table(("program", "variant", "seed", "named", "first after steps"), rows) if rows else "None."


def _mark(outcome: Outcome, case: Case) -> str:
    if outcome.variant != "faulty":
        return "noise" if outcome.alarms else ("early" if outcome.alarm_after else "")
    if not outcome.alarms:
        return "missed"
    if is_right(outcome, case, 1):
        return "first"
    return "top3" if is_right(outcome, case, 3) else "wrong"


def _said(outcome: Outcome) -> str:
    shown = (f"{named.cause} {named.level[0].upper()} {named.confidence:.2f}" for named in outcome.causes)
    return ", ".join(shown)


def _note(outcome: Outcome, case: Case) -> str:
    if outcome.variant == "faulty" and not is_right(outcome, case, 1):
        return f"  [accepted: {', '.join(case.accepted)}]"
    return ""


def _names(outcome: Outcome) -> str:
    return ", ".join(named.cause for named in outcome.alarms)


def _sentence(found: Score) -> str:
    shown = [f"{name} {100 * rate:.1f} %" for name, rate in found.rates.items()]
    return ", ".join(
        [*shown, f"calm {found.calm}/{found.fixed + found.controls}", f"median {found.median_steps} steps"]
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} % ({part}/{whole})" if whole else "–"


def _quantile(values: Iterable[float], q: float) -> float:
    """The smallest value that is not exceeded by a share `q` of them."""
    ordered = sorted(values)
    return ordered[max(0, -int(-q * len(ordered) // 1) - 1)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    ruled = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)
