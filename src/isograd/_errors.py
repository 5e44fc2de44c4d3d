"""Exceptions that a caller might want to catch. Everything else is `ValueError` (the user's mistake) or a bug.

IsogradError
├── RunNotFound        a path is not a run folder, or there is no run yet
├── RunUnreadable      the run file exists and cannot be understood
├── UnhealthyRun       a diagnosis has a cause at or above the level that was asked for
├── UnknownName        no symptom, cause, remedy or statistic has that name
└── ScriptError        the script or callable to be run does not exist, cannot be compiled or does not do its part
"""

from __future__ import annotations


class IsogradError(Exception):
    """Base of isograd's own exceptions; its text is one sentence: what, where, what to do."""


class RunNotFound(IsogradError):
    """A path is not a run folder, or no run has been recorded yet."""


class RunUnreadable(IsogradError):
    """A run file exists and cannot be read: truncated, not SQLite, or of a newer schema."""


class UnhealthyRun(IsogradError):
    """A diagnosis has a cause at or above the level that was asked for; its text is the diagnosis."""


class UnknownName(IsogradError):
    """No symptom, cause, remedy or statistic has that name."""


class ScriptError(IsogradError):
    """The script, module or callable to be run does not exist, has an error, or returns what cannot be used."""
