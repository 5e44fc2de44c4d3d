"""isograd finds why gradients vanish or explode. This is the public list; `isograd --help` is the command line.

with isograd.watch(model, optimizer) as run:
    ...  # the training loop, unchanged
print(run.diagnose())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isograd._capsule import Capsule as Capsule
    from isograd._capsule import open_capsule as open_capsule
    from isograd._changes import CannotApply as CannotApply
    from isograd._diagnose import Diagnosis as Diagnosis
    from isograd._errors import BadStep as BadStep
    from isograd._errors import CannotExport as CannotExport
    from isograd._errors import CannotReplay as CannotReplay
    from isograd._errors import CapsuleUnreadable as CapsuleUnreadable
    from isograd._errors import IsogradError as IsogradError
    from isograd._errors import RunNotFound as RunNotFound
    from isograd._errors import RunUnreadable as RunUnreadable
    from isograd._errors import ScriptError as ScriptError
    from isograd._errors import UnhealthyRun as UnhealthyRun
    from isograd._errors import UnknownName as UnknownName
    from isograd._guard import Guard as Guard
    from isograd._history import History as History
    from isograd._paired import verify as verify
    from isograd._preflight import preflight as preflight
    from isograd._recorded import diagnose as diagnose
    from isograd._recorded import open_run as open_run
    from isograd._remedy import Remedy as Remedy
    from isograd._remedy import Treatment as Treatment
    from isograd._rule import Evidence as Evidence
    from isograd._rule import Finding as Finding
    from isograd._rule import Rule as Rule
    from isograd._runs import Run as Run
    from isograd._treat import treat as treat
    from isograd._verify import Effect as Effect
    from isograd._verify import Verdict as Verdict
    from isograd._watch import Watch as Watch
    from isograd._watch import watch as watch

__version__ = "0.1.0"

__all__ = [
    "BadStep",
    "CannotApply",
    "CannotExport",
    "CannotReplay",
    "Capsule",
    "CapsuleUnreadable",
    "Diagnosis",
    "Effect",
    "Evidence",
    "Finding",
    "Guard",
    "History",
    "IsogradError",
    "Remedy",
    "Rule",
    "Run",
    "RunNotFound",
    "RunUnreadable",
    "ScriptError",
    "Treatment",
    "UnhealthyRun",
    "UnknownName",
    "Verdict",
    "Watch",
    "__version__",
    "diagnose",
    "open_capsule",
    "open_run",
    "preflight",
    "treat",
    "verify",
    "watch",
]

_HOME = {
    "BadStep": "_errors",
    "CannotApply": "_changes",
    "CannotExport": "_errors",
    "CannotReplay": "_errors",
    "Capsule": "_capsule",
    "CapsuleUnreadable": "_errors",
    "Diagnosis": "_diagnose",
    "Effect": "_verify",
    "Evidence": "_rule",
    "Finding": "_rule",
    "Guard": "_guard",
    "History": "_history",
    "IsogradError": "_errors",
    "Remedy": "_remedy",
    "Rule": "_rule",
    "Run": "_runs",
    "RunNotFound": "_errors",
    "RunUnreadable": "_errors",
    "ScriptError": "_errors",
    "Treatment": "_remedy",
    "UnhealthyRun": "_errors",
    "UnknownName": "_errors",
    "Verdict": "_verify",
    "Watch": "_watch",
    "diagnose": "_recorded",
    "open_capsule": "_capsule",
    "open_run": "_recorded",
    "preflight": "_preflight",
    "treat": "_treat",
    "verify": "_paired",
    "watch": "_watch",
}


def __getattr__(name: str) -> Any:
    # Delayed: `isograd run` must not import NumPy before the script does, which sets thread counts before it does so.
    if name not in _HOME:
        raise AttributeError(f"module 'isograd' has no attribute {name!r}")
    value = getattr(import_module(f"isograd.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
