"""Keras models watched as the suites of this folder need it: one run file, and nothing that fails in silence."""

import contextlib
import math

from isograd._record import RunFile
from isograd._schedule import Schedule
from isograd._watch import Shield
from isograd.frameworks.keras import Observer


class EveryOther(Schedule):
    """Deep and cheap calls of the train function in turn: the most that can be read of both."""

    asked = 0

    def is_deep(self, step):
        self.asked += 1
        return self.asked % 2 == 1


def every_step():
    return Schedule(every=1, budget=1.0, allowance=math.inf)


class Watched:
    """What came of a watch: its observer, its run once it is over, and the sentences it told."""

    def __init__(self, file, observer, told):
        self.file, self.observer, self.told = file, observer, told

    @property
    def run(self):
        self.observer.drain()
        return self.file.read()

    @property
    def history(self):
        (history,) = self.run.histories
        return history


@contextlib.contextmanager
def watched(folder, make_schedule=EveryOther, *, attached=(), **options):
    """Watch everything that trains within it; fails if anything of the watcher has.

    `attached`: models that have trained before.
    """
    failures, told = [], []
    file = RunFile.create(folder, meta={"framework": "keras"}, on_failure=failures.append)
    shield = Shield(failures.append)
    observer = Observer(file, shield, make_schedule=make_schedule, on_warning=told.append, **options)
    observer.attach(attached)
    try:
        yield Watched(file, observer, told)
    finally:
        observer.detach()
    assert not failures, failures
