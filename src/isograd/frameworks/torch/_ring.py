"""The ring of the last steps: what data loaders yielded, how the root modules were called, and the generators then."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from isograd.frameworks.torch._generators import Generators
from isograd.frameworks.torch._notes import Kept, Noted, Notes

STEPS = 64
"""Steps that are held at most: each comes with generators' states of some 40 KB, however small its data."""

CALLS = 64
"""Calls of root modules that are noted of one step: an optimizer with a closure may make any number."""

BATCHES = 256
"""Batches of one step, likewise: a validation between two steps yields any number. The latest are kept."""


@dataclass(eq=False)
class Batch:
    """A batch as it was delivered. `source`: which iterator yielded it; `used`, `evaluated`: a root was called with it
    in training, outside of training.
    """

    source: int
    data: Noted
    generators: Generators
    used: bool = False
    evaluated: bool = False


@dataclass(eq=False)
class Call:
    """A call of a root module. `autocast`: device type -> dtype, of those where it was on."""

    root: str
    args: Noted
    kwargs: Noted
    autocast: dict[str, str]
    generators: Generators | None


@dataclass(eq=False)
class Moments:
    """What was noted of one step. `batches_dropped`, `calls_dropped`: how many were too many or too large."""

    batches: list[Batch] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    batches_dropped: int = 0
    calls_dropped: int = 0

    def leaves(self) -> dict[str, Kept]:
        """All tensors and arrays, by key."""
        noted = [batch.data for batch in self.batches] + [d for call in self.calls for d in (call.args, call.kwargs)]
        return {key: kept for each in noted for key, kept in each.leaves.items()}

    def bytes(self) -> int:
        """What it keeps from being freed; memory that several tensors share counts once."""
        return sum({kept.place: kept.bytes for kept in self.leaves().values()}.values())


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A step that has ended."""

    subject: str
    step: int
    moments: Moments
    bytes: int


class Ring:
    """Gathers the step under way, and holds the newest `STEPS` of those that have ended, up to `limit` bytes of data.

    What lies in memory shared with the loader's workers is let go with its step: few bytes are free there.
    """

    def __init__(self, limit: int) -> None:
        self.notes = Notes()
        self.limit = limit
        self._now = Moments()
        self._now_bytes = 0
        self._entries: deque[Entry] = deque()
        self._entry_bytes = 0
        self._latest: list[Batch] = []  # of the last step that had any

    # ---- the step under way ---------------------------------------------------------------------------------------

    def delivered(self, batch: Batch) -> None:
        """A loader has yielded a batch."""
        self._now.batches.append(batch)
        self._now_bytes += batch.data.bytes
        if len(self._now.batches) > BATCHES or self._now_bytes > self.limit:
            self._drop_batches()

    def _drop_batches(self) -> None:
        """The first of those that only an evaluation saw, else the first; the last one always stays."""
        held = self._now.batches
        while len(held) > 1 and (len(held) > BATCHES or self._now_bytes > self.limit):
            oldest = next((b for b in held[:-1] if b.evaluated and not b.used), held[0])
            held.remove(oldest)
            self._now.batches_dropped += not (oldest.evaluated and not oldest.used)
            self._now_bytes -= oldest.data.bytes

    @property
    def has_batches(self) -> bool:
        """Whether a loader has yielded anything for the step under way."""
        return bool(self._now.batches)

    @property
    def wants_call(self) -> bool:
        """Whether a further call would be noted."""
        if len(self._now.calls) < CALLS:
            return True
        self._now.calls_dropped += 1
        return False

    def called(self, call: Call) -> None:
        """A root was called in training."""
        self._now.calls.append(call)
        self._mark(call.args.places | call.kwargs.places, "used")

    def evaluated(self, places: set[int]) -> None:
        """A root was called outside of training with tensors in these places."""
        self._mark(places, "evaluated")

    def _mark(self, places: set[int], what: str) -> None:
        for batch in self._now.batches:
            if not places.isdisjoint(batch.data.places):
                setattr(batch, what, True)

    def end_step(self, step: int, subject: str) -> None:
        """What was gathered belongs to this step, but for batches that were fetched ahead of the next one."""
        done, self._now = self._now, Moments()
        ahead = _ahead(done.batches)
        done.batches = [batch for batch in _trained_on(done.batches) if batch not in ahead]
        self._latest = list(done.batches) or self._latest
        self._now.batches = ahead
        self._now_bytes = sum(batch.data.bytes for batch in ahead)
        self.notes.begin_step()
        _let_go(done)
        if done.batches or done.calls:
            self._push(Entry(subject=subject, step=step, moments=done, bytes=done.bytes()))

    def _push(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._entry_bytes += entry.bytes
        while self._entry_bytes > self.limit or len(self._entries) > STEPS:
            self._entry_bytes -= self._entries.popleft().bytes

    # ---- asking ---------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> Sequence[Entry]:
        """The steps that are held, oldest first."""
        return tuple(self._entries)

    @property
    def bytes(self) -> int:
        """What the ended steps keep from being freed."""
        return self._entry_bytes

    def moments_of(self, step: int, subject: str) -> Moments:
        """What belongs to a step: the one under way, or one that has ended and is still held.

        Where no batch came for it, the last ones that came count: a GAN takes two steps on one batch.
        """
        for entry in reversed(self._entries):
            if (entry.step, entry.subject) == (step, subject):
                return entry.moments
        now = self._now
        batches = [b for b in _trained_on(now.batches) if b not in _ahead(now.batches)] or self._latest
        return Moments(batches, now.calls, now.batches_dropped, now.calls_dropped)


def _trained_on(batches: list[Batch]) -> list[Batch]:
    """Without those of a loader all of whose batches only an evaluation saw, if there are others."""
    trained = {b.source for b in batches if b.used or not b.evaluated}
    return [b for b in batches if b.source in trained] or batches


def _ahead(batches: list[Batch]) -> list[Batch]:
    """Batches after the last that was used of the same iterator: some programs fetch one ahead. Where no batch met a
    root as it was (it was moved to a device, say), that cannot be known, and there are none.
    """
    last = {batch.source: index for index, batch in enumerate(batches) if batch.used}
    return [b for index, b in enumerate(batches) if index > last.get(b.source, len(batches))]


def _let_go(moments: Moments) -> None:
    """What a step need not hold any longer once it has ended."""
    for kept in moments.leaves().values():
        if kept.is_copy:
            kept.source = None
    for batch in [b for b in moments.batches if _is_in_shared_memory(b.data)]:
        moments.batches.remove(batch)
        moments.batches_dropped += 1
    for call in [c for c in moments.calls if _is_in_shared_memory(c.args) or _is_in_shared_memory(c.kwargs)]:
        moments.calls.remove(call)
        moments.calls_dropped += 1


def _is_in_shared_memory(noted: Noted) -> bool:
    return any(kept.is_shared_memory for kept in noted.leaves.values() if not kept.is_copy)
