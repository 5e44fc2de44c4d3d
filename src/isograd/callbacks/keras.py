"""`model.fit(..., callbacks=[isograd.callbacks.keras.WatchCallback()])`: watch what Keras trains, on any backend."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import keras

from isograd._diagnose import Diagnosis
from isograd._guard import Guard
from isograd._report import verdict
from isograd._settings import load_settings
from isograd._terminal import show
from isograd._watch import Off, Watch


class WatchCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Watches a model from the first step of `fit` to its end, and then prints what it found.

    `out`, `every`, `budget` and `guard`: as of `isograd.watch`. `verbose`: whether the diagnosis is printed when `fit`
    ends. Several calls of `fit` with the same callback are several runs. Where `fit` raises, `on_train_end` is not
    called: what had been read by then is in the run folder, and the next `fit` begins another run.
    """

    def __init__(
        self,
        *,
        out: str | os.PathLike[str] | None = None,
        every: int | None = None,
        budget: float | None = None,
        guard: Guard | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self._out, self._every, self._budget, self._guard, self._verbose = out, every, budget, guard, verbose
        self.run: Watch | Off | None = None
        """The run of the last `fit`: an `isograd.Watch` to diagnose and to look at. None before the first."""

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Begin a run."""
        if isinstance(self.run, Watch):
            self.run.close()
        settings = load_settings(out=self._out, every=self._every, budget=self._budget)
        if not settings.enabled:
            self.run = Off()
            return
        self.run = Watch(
            (self.model,),
            (),
            framework="keras",
            out=settings.out,
            every=settings.every,
            budget=settings.budget,
            meta={"command": list(sys.argv), "script": Path(sys.argv[0]).name if sys.argv else ""},
            options=settings.rules,
            frame=sys._getframe(1),
            guard=self._guard,
        )

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Finish the run."""
        if not isinstance(self.run, Watch):
            return
        self.run.close()
        if self._verbose and self.run.reports and self.run.step:
            show(verdict(self.run.diagnose(), self.run.histories()), sys.stdout)

    def diagnose(self) -> Diagnosis:
        """The diagnosis of the last run. Raises ValueError before the first."""
        if self.run is None:
            raise ValueError("there is no run yet: fit the model first")
        return self.run.diagnose()
