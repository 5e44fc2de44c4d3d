"""Exceptions that a caller might want to catch. Everything else is `ValueError` (the user's mistake) or a bug.

IsogradError
├── RunNotFound        a path is not a run folder, or there is no run yet
├── RunUnreadable      the run file exists and cannot be understood
├── UnhealthyRun       a diagnosis has a cause at or above the level that was asked for
├── UnknownName        no symptom, cause, remedy or statistic has that name
└── ScriptError        the script to be run does not exist or cannot be compiled
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
    """The script or module to be run does not exist or has a syntax error."""
