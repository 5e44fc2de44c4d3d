"""MLflow: a run in a SQLite store of its own."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from isograd._export import Format, points
from isograd._runs import Run

_TOGETHER = 1000  # metrics that one call may hold
_SORTED = 64_000  # metrics in memory at once
_LONGEST = 250  # characters of a key in MLflow's tables


@dataclass(frozen=True, kw_only=True)
class Mlflow(Format):
    """One metric per key. MLflow keeps NaN, and the largest double for Inf.

    Its keys allow letters, digits, `_ - . /` and blanks: anything else becomes `_`, and `keys.json` tells which.
    """

    needs: ClassVar[str] = "mlflow"

    def write(self, run: Run, folder: Path, *, place: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        for library in ("mlflow", "alembic"):
            logging.getLogger(library).setLevel(logging.WARNING)  # making the tables is told line by line
        client = MlflowClient(tracking_uri=_uri(folder))
        artifacts = (place / "artifacts").as_uri()
        experiment = client.create_experiment("isograd", artifact_location=artifacts)
        tags = {"isograd.run": run.id, "isograd.script": str(run.meta.get("script", ""))}
        logged = client.create_run(experiment, run_name=run.id, tags=tags, start_time=_start(run)).info.run_id
        allowed: dict[str, str] = {}
        metrics = _metrics(run, allowed)
        while many := list(itertools.islice(metrics, _SORTED)):
            # By key: a call updates the latest value of each of its keys, which takes longer than adding readings.
            many.sort(key=lambda metric: (metric.key, metric.step))
            for start in range(0, len(many), _TOGETHER):
                client.log_batch(logged, metrics=many[start : start + _TOGETHER])
        client.set_terminated(logged)
        _close(client)
        renamed = {new: key for key, new in allowed.items() if new != key}
        if renamed:
            (folder / "keys.json").write_text(json.dumps(renamed, indent=2, ensure_ascii=False), encoding="utf-8")

    def reading(self, place: Path) -> str:
        return f"mlflow ui --backend-store-uri {shlex.quote(_uri(place))}"


def _metrics(run: Run, allowed: dict[str, str]) -> Iterator[Any]:
    from mlflow.entities import Metric

    taken: set[str] = set()
    for point in points(run):
        for key, value in point.values.items():
            if key not in allowed:
                allowed[key] = _allowed(key, taken)
                taken.add(allowed[key])
            yield Metric(allowed[key], value, round(1000 * point.time), point.step)


def _allowed(key: str, taken: set[str]) -> str:
    """`key` as MLflow accepts it, and as no other key is called."""
    parts = [re.sub(r"[^\w\-. ]", "_", part) for part in key.split("/")]
    plain = "/".join(part if part.strip(". ") else f"_{part}" for part in parts)
    if len(plain) <= _LONGEST and plain not in taken:
        return plain
    return f"{plain[: _LONGEST - 9]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def _start(run: Run) -> int:
    return next((round(1000 * point.time) for point in points(run)), 0)


def _close(client: Any) -> None:
    """Let go of the file, which is about to get its place."""
    engine = getattr(getattr(client._tracking_client, "store", None), "engine", None)
    if engine is not None:
        engine.dispose()
