"""Exceptions that a caller might want to catch. Everything else is `ValueError` (the user's mistake) or a bug.

IsogradError
├── BadStep            a guard that was asked to stop has stopped the run before a bad step
├── CannotExport       a run cannot be written in the format or to the place that was named
├── CannotReplay       the program that was named does not come to the captured step
├── CapsuleUnreadable  a capsule is missing, damaged, or none
├── RunNotFound        a path is not a run folder, or there is no run yet
├── RunUnreadable      the run file exists and cannot be understood
├── UnhealthyRun       a diagnosis has a cause at or above the level that was asked for
├── UnknownName        no symptom, cause, remedy or statistic has that name
└── ScriptError        the script or callable to be run does not exist, cannot be compiled or does not do its part
"""

from __future__ import annotations


class IsogradError(Exception):
    """Base of isograd's own exceptions; its text is one sentence: what, where, what to do."""


class BadStep(IsogradError):
    """A guard has ended the run before a bad step was taken: weights and optimizer state are as before it."""


class CannotExport(IsogradError):
    """The format is not known or lacks its package, the place is taken, or there is nothing to export."""


class CannotReplay(IsogradError):
    """The named program did not come to the captured step, or is another one."""


class CapsuleUnreadable(IsogradError):
    """A path is no capsule, or one that is truncated, of a newer format, or not what isograd writes."""


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
