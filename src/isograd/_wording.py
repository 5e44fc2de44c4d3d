"""The sentences that the terminal, the page and the notebook share: the headline, what happened, a number's limit.

It decides nothing: what it words stands in a `Diagnosis` or a `History`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from isograd._chart import number
from isograd._diagnose import Diagnosis
from isograd._history import Event, History
from isograd._nonfinite import operation
from isograd._rule import LEVELS, Evidence, Finding, Level
from isograd._schedule import ALLOWANCE
from isograd.rules import RULES

# ---- the headline -------------------------------------------------------------------------------------------------


def headline(diagnosis: Diagnosis, histories: Sequence[History] = ()) -> tuple[tuple[str, str], ...]:
    """The parts of the first sentences: (words, what they stand for: "healthy", a level, or "" for no emphasis)."""
    seen = f"{diagnosis.steps} steps of {listed(diagnosis.subjects, 4)}"
    if diagnosis.preflight is not None:
        seen = "a model before its first step"
    overhead = _overhead(diagnosis, histories)
    if diagnosis.healthy:
        looked = len(RULES) - len({u.rule for u in diagnosis.unmeasured})
        return ("healthy", "healthy"), (f". {looked} rules looked at {seen} and found no fault.{overhead}", "")
    causes = [cause.finding for cause in diagnosis.at_least("warning")]
    kind = "First cause" if stage_of(causes[0].name) != "symptom" else "Seen first"
    counted = f"{len(causes)} {'finding' if len(causes) == 1 else 'findings'} in {seen}. {kind}: "
    level = max((finding.level for finding in causes), key=LEVELS.index)
    return ("not healthy", level), (f", {counted}", ""), (causes[0].name, level), (f".{overhead}", "")


def _overhead(diagnosis: Diagnosis, histories: Sequence[History]) -> str:
    share = diagnosis.overhead
    if share is None:
        return ""
    spent = [np.nansum(h["watch_seconds"].values) for h in histories if "watch_seconds" in h]
    seconds = float(sum(spent))
    # Of a short run the share says little: what it may cost once is an allowance in seconds.
    if spent and share > 0.01 and seconds <= ALLOWANCE:
        free = f"the first {ALLOWANCE:.0f} s are free"
        return f" Watch overhead {max(seconds, 0.1):.1f} s ({percent(share)}; {free})."
    return f" Watch overhead {percent(share)}."


# ---- what happened ------------------------------------------------------------------------------------------------


def happenings(history: History) -> Iterator[str]:
    """What was changed while the program ran, and what ended the run or the watching early, in words."""
    yield from interventions(history)
    for kind in ("exception", "interrupted", "watch-detached"):
        yield from (_ending(event) for event in history.events_of(kind))


def interventions(history: History) -> Iterator[str]:
    """Changes applied, refused and undone, each once; a change of several optimizers is one, from the first on."""
    told: set[str] = set()
    for event in history.events:
        line = _intervention(event)
        if line is not None and line[1] not in told:
            told.add(line[1])
            yield " ".join(line)
        if event.kind == "treatment-undone":
            told.clear()  # it may be applied once more
    for kind, done in _AT_BAD_STEPS.items():
        events = history.events_of(kind)
        if events:
            steps = f"step {events[0].step}" if len(events) == 1 else f"{len(events)} steps, the first {events[0].step}"
            yield f"{done}: {steps}: {_why(events[0])}."
    for kind in ("rewound", "guard-refused"):
        yield from (occurrence(event)[1] for event in history.events_of(kind))


def occurrence(event: Event) -> tuple[Level, str]:
    """One event by itself: how grave it is, and one sentence. Of an unknown kind: its name and its facts."""
    if event.kind in _AT_BAD_STEPS:
        return "warning", f"{_AT_BAD_STEPS[event.kind]}: step {event.step}: {_why(event)}."
    line = _intervention(event)
    if line is not None:
        return "warning" if event.kind == "treatment-refused" else "info", " ".join(line)
    if event.kind in ("exception", "interrupted", "watch-detached"):
        return "warning" if event.kind == "interrupted" else "error", _ending(event)
    return _OCCURRENCES.get(event.kind, _unknown)(event)


def _ending(event: Event) -> str:
    if event.kind == "exception":
        return f"The script raised {event.data.get('type', 'an exception')} at step {event.step}."
    if event.kind == "interrupted":
        return f"The run was interrupted at step {event.step}."
    return f"Watching stopped at step {event.step}: {event.data.get('message', 'isograd failed')}"


_AT_BAD_STEPS = {
    "bad-step-skipped": "Skipped",
    "bad-step-clipped": "Clipped",
    "bad-step": "Bad and taken",
    "bad-step-stopped": "Stopped",
    "guard-gave-up": "The guard let pass",
    "guard-relearned": "The guard learned its ranges anew",
}
"""What was done at bad steps, by kind of event."""


def _why(event: Event) -> str:
    return str(event.data.get("why", "gradients hold NaN or Inf"))


def _intervention(event: Event) -> tuple[str, str] | None:
    """(when, what) of a change applied, refused or undone; None for any other event."""
    match event.kind:
        case "treatment-applied":
            detail = f", {event.data['detail']}" if event.data.get("detail") else ""
            return f"Applied from step {event.step} on:", f"{_change(event.data.get('change', {}))}{detail}."
        case "treatment-refused":
            return f"Not applied (step {event.step}):", str(event.data.get("why", ""))
        case "treatment-undone":
            left = " ".join(map(str, _items(event.data.get("left")))) or "Nothing of it stays."
            return f"Undone at step {event.step}.", left
    return None


def _items(value: Any) -> Sequence[Any]:
    """What a file says is a list, if it is one."""
    return value if isinstance(value, (list, tuple)) else ()


def _change(change: Any) -> str:
    """`ClipGradients` with its fields is `clip gradients (method norm, limit 1)`."""
    if not isinstance(change, Mapping):
        return "a change"
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(change.get("change", "a change"))).lower()
    given = [f"{k} {_field(v)}" for k, v in change.items() if k != "change" and v not in (None, "", (), [])]
    return f"{words} ({', '.join(given)})" if given else words


def _field(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return listed([" ".join(map(_field, v)) if isinstance(v, (list, tuple)) else _field(v) for v in value], 3)
    return str(value)


def _nonfinite(event: Event) -> tuple[Level, str]:
    place = str(event.data.get("place", "value"))
    return "error", f"NaN or Inf at step {event.step}, in the {place}: {operation(event)}."


def _loss_graph(event: Event) -> tuple[Level, str]:
    operations = [str(name) for name in _items(event.data.get("operations"))]
    return "info", f"The loss is computed by {', '.join(reversed(operations)) or 'operations that are not known'}."


def _step_skipped(event: Event) -> tuple[Level, str]:
    scale = event.data.get("loss_scale")
    at = f" at a loss scale of {scale:g}" if isinstance(scale, (int, float)) else ""
    return "warning", f"The gradient scaler skipped step {event.step}{at}: a gradient was not finite."


def _requires_grad(event: Event) -> tuple[Level, str]:
    done = "made trainable" if event.data.get("value") else "frozen"
    return "info", f"{event.data.get('parameter', 'A parameter')} was {done} before step {event.step}."


def _freeze_attribute(event: Event) -> tuple[Level, str]:
    name = event.data.get("module") or "the model"
    return "warning", f"requires_grad = False was set on the module {name} itself, which freezes nothing."


def _clip_after_step(event: Event) -> tuple[Level, str]:
    return "warning", f"Gradients were clipped after step {event.step} had been taken."


def _unfinished(event: Event) -> tuple[Level, str]:
    return "info", f"A forward and backward pass before step {event.step} led to no step."


def _snapshots(event: Event) -> tuple[Level, str]:
    sizes = [event.data.get(name) for name in ("bytes", "limit")]
    each, limit = (f"{size / 1e6:.1f} MB" if isinstance(size, (int, float)) else "some memory" for size in sizes)
    return "info", f"Each of the guard's snapshots takes {each}, all of them together at most {limit}."


def _guard_detached(event: Event) -> tuple[Level, str]:
    return "error", f"Guarding stopped at step {event.step}: {event.data.get('message', 'isograd failed')}"


def _rewound(event: Event) -> tuple[Level, str]:
    return "warning", f"Rewound at step {event.step}, by {event.data.get('steps', 'some')} steps."


def _guard_refused(event: Event) -> tuple[Level, str]:
    return "warning", f"Not guarded: {str(event.data.get('why', '')).rstrip('.')}."


def _unknown(event: Event) -> tuple[Level, str]:
    facts = json.dumps(dict(event.data), default=str)[:300] if event.data else ""
    return "info", f"{event.kind.replace('-', ' ')} {facts}".strip()


_OCCURRENCES = {
    "nonfinite": _nonfinite,
    "loss-graph": _loss_graph,
    "step-skipped": _step_skipped,
    "requires-grad": _requires_grad,
    "freeze-attribute": _freeze_attribute,
    "clip-after-step": _clip_after_step,
    "unfinished-step": _unfinished,
    "snapshots": _snapshots,
    "guard-detached": _guard_detached,
    "rewound": _rewound,
    "guard-refused": _guard_refused,
}


# ---- parts of sentences -------------------------------------------------------------------------------------------


def measured(evidence: Evidence) -> str:
    """A number against its limit."""
    where = f" in {evidence.layer}" if evidence.layer else ""
    observed, limit = number(evidence.observed), number(evidence.limit)
    return f"{evidence.statistic} {observed} at step {evidence.step}{where}, limit {limit}."


def steps_of(finding: Finding) -> str:
    """`step 3` or `steps 3-99`."""
    first, last = finding.first_step, finding.last_step
    return f"step {first}" if first == last else f"steps {first}-{last}"


def listed(names: Sequence[str], most: int) -> str:
    """`a, b and 3 more`."""
    shown, more = ", ".join(names[:most]), len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown


def percent(share: float) -> str:
    """`0.6 %`; what is below a tenth of a percent is said to be so."""
    hundredths = 100 * share
    if 0 < hundredths < 0.05:
        return "below 0.1 %"
    return f"{hundredths:.1f} %" if hundredths < 10 else f"{hundredths:.0f} %"


def stage_of(name: str) -> str:
    """Where the cause of this name sits; "" for a name that no rule has."""
    rule = RULES.get(name)
    return rule.stage if rule else ""
