"""When to take snapshots of a guarded program, and going back to them when trouble lasts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from isograd._guard import Guard
from isograd._judge import Decision
from isograd.frameworks.torch._guarded import Guarded
from isograd.frameworks.torch._snapshot import Snapshots
from isograd.frameworks.torch._step_reading import Agreement
from isograd.frameworks.torch._training_state import TrainingState

SNAPSHOT_SHARE = 0.005
"""Share of the time that snapshots may take: half of the watcher's own budget of 1 %."""

CLOSEST = 16
"""Steps between snapshots at least: closer ones would all hold the same trouble."""

Tell = Callable[[str, dict[str, Any], tuple[str, int] | None], None]
"""(kind of event, its data, subject and step that it is about)."""


class Rewinding:
    """Takes snapshots of all that is `guarded`, and of `others`; goes back to them. It does nothing until `begin`."""

    def __init__(
        self,
        guard: Guard,
        guarded: Mapping[Optimizer, Guarded],
        others: Sequence[object],
        *,
        on_event: Tell,
        on_warning: Callable[[str], None],
    ) -> None:
        self._guard, self._guarded, self._others = guard, guarded, tuple(others)
        self._on_event, self._on_warning = on_event, on_warning
        self._is_wanted = guard.rewind
        self._snapshots: Snapshots | None = None
        self._next = 0
        self._marks: list[float] = []
        self._has_told_memory = False
        self.began = 0

    @property
    def needs_beginning(self) -> bool:
        """Whether a first snapshot is to be taken before the step that comes."""
        return self._is_wanted and self._snapshots is None

    @property
    def can_go_back(self) -> bool:
        """Whether there is a state to go back to."""
        return self._snapshots is not None and bool(self._snapshots.steps)

    def begin(self, guarded: Guarded, step: int) -> None:
        """Before the first step: what there is to go back to if it all goes wrong at once."""
        # Not whatever else is alive: a model that the program has done with must not stand in the way.
        optimizers = [one for one, known in self._guarded.items() if not known.refusal]
        roots = list({id(root): root for one in self._guarded.values() for root in one.roots}.values())
        smallest = guarded.agreement.smallest if guarded.agreement is not None else int
        self.began = step
        state = TrainingState(roots, optimizers, self._others)
        self._snapshots = Snapshots(state, memory=self._guard.memory, smallest=smallest)
        self._next = step + CLOSEST
        if not self._snapshots.take(step):
            self._tell_shortage(guarded.agreement)

    def forget(self) -> None:
        """Begin anew: what the snapshots hold is not all of the program any more."""
        self._snapshots = None

    def end(self) -> None:
        """Take no more, and let go of those that there are."""
        self._is_wanted, self._snapshots = False, None

    def end_step(self, guarded: Guarded, step: int) -> Decision | None:
        """After a good step: take a snapshot where one is due. What to do where that has found the state damaged."""
        self._marks = [*self._marks[-CLOSEST:], time.perf_counter()]
        if self._snapshots is None or step < self._next or not self._all_is_well():
            return None
        self._next = step + CLOSEST
        if not self._snapshots.take(step):
            self._tell_shortage(guarded.agreement)
            return self._damaged(guarded)
        if not self._has_told_memory:  # with the first one that holds the optimizer's state
            self._has_told_memory = True
            self._on_event("snapshots", {"bytes": self._snapshots.bytes_each, "limit": self._snapshots.limit}, None)
        self._next = step + self._distance(guarded)
        return None

    def _all_is_well(self) -> bool:
        return all(guarded.judge.in_a_row == 0 for guarded in self._guarded.values())

    def _tell_shortage(self, agreement: Agreement | None) -> None:
        """Where there is a reason why no snapshot can be taken, on any rank: give up rewinding, and what there was
        to go back to: it is from before the state has grown so large, and would be the run's beginning.
        """
        assert self._snapshots is not None
        why = self._snapshots.refusal
        if agreement is not None and agreement.any(bool(why)):
            why = why or "Another rank can take no snapshot."
        if why:
            self.end()
            self._on_warning(f"the guard cannot rewind: {why}")
            self._on_event("guard-refused", {"why": why}, None)

    def _damaged(self, guarded: Guarded) -> Decision | None:
        """What to do where a snapshot was refused because the state is not finite, on any rank."""
        if self._snapshots is None:
            return None
        found, agreement = self._snapshots.found_damage, guarded.agreement
        if not (found if agreement is None else agreement.any(found)):
            return None
        return guarded.judge.damaged(can_rewind=self.can_go_back)

    def _distance(self, guarded: Guarded) -> int:
        """Steps to the next snapshot, so that they take `SNAPSHOT_SHARE` of the time; on all ranks the same."""
        assert self._snapshots is not None
        steps = len(self._marks) - 1
        each = (self._marks[-1] - self._marks[0]) / steps if steps else 0.0
        distance = self._snapshots.seconds / (SNAPSHOT_SHARE * each) if each else float(CLOSEST)
        if guarded.agreement is not None:
            distance = float(guarded.agreement.sums([distance])[0]) / guarded.agreement.size
        return max(CLOSEST, math.ceil(distance))

    def go_back(self, guarded: Guarded, decision: Decision) -> int | None:
        """The step of the snapshot that is now the program's state; None where none fits."""
        assert self._snapshots is not None
        oldest = min(self._snapshots.steps, default=0)
        taken = self._snapshots.go_back(max(decision.before, oldest))
        if taken is not None:
            guarded.judge.went_back(taken)
        return taken
