"""ineffective-freeze."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isograd._history import History, Integers
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class IneffectiveFreeze(Rule):
    """The program means to freeze parameters, and an optimizer goes on moving them.

    Detects
        Parameters that a step changed (update_norm above 0) in `share` of the deep readings or more, while the program
        had said that they should not change: a module carries an attribute `requires_grad` set to False although its
        parameters require gradients, or a parameter's `requires_grad` is False and the optimizer that still holds it
        moves it.

    Why it matters
        `layer.requires_grad = False` only sets an attribute of the module: parameters have their own
        (`layer.requires_grad_(False)`). And an optimizer skips a parameter that has no gradient, not one that is
        frozen: gradients that are zeroed instead of removed leave momentum and weight decay at work. What was learned
        before is lost unnoticed.

    Decided by
        share: 0.5 of the readings made while the parameter was meant to be frozen, `readings` (2) at least. Movement
        itself has no threshold: a frozen parameter moves by exactly 0.

    Stays silent when
        What is frozen stays where it is, parameters are unfrozen again (gradually, from the output), or weights that
        no optimizer holds are set by the program (target networks, averages).

    Remedies
        freeze-parameters

    References
        PyTorch, Autograd mechanics, section Locally disabling gradient computation (`requires_grad_`); pytorch/pytorch
        issue 679 (frozen parameters moved by momentum and weight decay); Howard & Ruder 2018, arXiv:1801.06146
        (gradual unfreezing).
    """

    stage: ClassVar[Stage] = "loop"
    needs: ClassVar[tuple[str, ...]] = ("update_norm",)
    uses: ClassVar[tuple[str, ...]] = ("update_ratio",)
    explains: ClassVar[tuple[str, ...]] = ("loss-divergence", "loss-plateau", "loss-spike")
    remedies: ClassVar[tuple[str, ...]] = ("freeze-parameters",)

    share: float = 0.5
    readings: int = 2

    def check(self, history: History) -> Iterator[Finding]:
        steps = history["update_norm"].steps
        marked = self._by_attribute(history)
        frozen = {
            i: mask
            for i, parameter in enumerate(history.parameters)
            if parameter.optimized
            for mask in [self._is_meant_frozen(history, i, marked, steps)]
            if mask.any()
        }
        moved = {i: self._moving_steps(history, i, mask) for i, mask in frozen.items()}
        moved = {i: hits for i, hits in moved.items() if len(hits)}
        if not moved:
            return
        order = sorted(moved, key=lambda i: (int(moved[i][0]), i))
        name, first = history.parameters[order[0]].name, int(moved[order[0]][0])
        update = float(history["update_norm"].values[np.searchsorted(steps, first), order[0]])
        how = (
            f"`{history.parameters[order[0]].layer}.requires_grad = False` sets an attribute of the module, not of its "
            "parameters"
            if history.parameters[order[0]].layer in marked
            else "their `requires_grad` is False, but the optimizer that holds them does not skip them"
        )
        yield self.finding(
            history,
            level="warning",
            message=f"{len(moved)} {'parameter' if len(moved) == 1 else 'parameters'} meant to be frozen "
            f"{'moves' if len(moved) == 1 else 'move'}, {name} first, by {update:.2g} at step {first}: {how}.",
            first_step=first,
            layers=tuple(history.parameters[i].name for i in order),
            evidence=(
                # The smallest float64 above 0: any movement at all.
                Evidence(statistic="update_norm", observed=update, limit=5e-324, step=first, layer=name),
            ),
            confidence=0.9,
        )

    def _by_attribute(self, history: History) -> dict[str, int]:
        """Modules with an attribute that freezes nothing -> the step at which it was seen."""
        seen: dict[str, int] = {}
        for event in history.events_of("freeze-attribute"):
            seen.setdefault(str(event.data.get("module", event.layer or "")), event.step)
        return seen

    def _is_meant_frozen(
        self, history: History, index: int, marked: dict[str, int], steps: Integers
    ) -> NDArray[np.bool_]:
        """[S]: at which of the steps the program wants this parameter to stay."""
        parameter = history.parameters[index]
        inside = [
            step
            for module, step in marked.items()
            if parameter.layer == module or parameter.layer.startswith(f"{module}.")
        ]
        if inside and parameter.trainable:
            return np.asarray(steps >= min(inside))
        turns = [
            (event.step, bool(event.data.get("value")))
            for event in history.events_of("requires-grad")
            if event.data.get("parameter") == parameter.name
        ]
        is_trainable = np.full(len(steps), not turns[0][1] if turns else parameter.trainable)
        for step, value in turns:
            is_trainable[steps >= step] = value
        return ~is_trainable

    def _moving_steps(self, history: History, index: int, mask: NDArray[np.bool_]) -> Integers:
        """The steps that moved the parameter while it was meant to be frozen; none where they are too few."""
        series = history["update_norm"]
        read = mask & np.isfinite(series.values[:, index])
        moving = read & (series.values[:, index] > 0)
        enough = read.sum() >= self.readings and moving.sum() >= max(1.0, self.share * float(read.sum()))
        return np.asarray(series.steps[moving] if enough else series.steps[:0])
