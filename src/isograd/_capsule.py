"""Capsules: what one bad step was made of, on disk, to be replayed later. This module reads them.

A capsule is a folder `<run>/capsules/step-000118` (`step-000118-discriminator` where a run has several subjects,
`…-2` where a step was captured twice) with five files. No file is a pickle, and opening or listing one runs no code.

    capsule.json              what is described below
    model.safetensors         parameters and buffers by name, as they were before the step's forward pass
    optimizer.safetensors     tensors of the optimizer's state, "<parameter>/<key>"
    batch.safetensors         the tensors of `batches`, `calls` and `locals`
    generators.safetensors    states of random-number generators, uint8

`capsule.json` is plain JSON. A number that is not finite is the string "nan", "inf" or "-inf"; a *tree* is nested data
as `_tree.py` writes it, whose tensors stand in the safetensors file that is named here.

    schema          1
    run, subject    whose step it is; `run` is "" where there is no run file
    step            number of the step, from 0, as in the run file
    written         UTC time, ISO 8601
    why             [{"channel": "loss", "layer": null, "observed": number, "limit": number}, …], never empty in what
                    isograd writes; `limit` is null where there is none (a value that is not finite)
    action          skipped, clipped, rewound, lowered, observed or stopped
    loss            number, or null where it is not known
    grad_norms      {parameter: L2 norm of its gradient, summed in float64}; of those that have a gradient
    grad_hashes     {parameter: blake2b of the gradient's bytes (16 bytes in hex; contiguous, row-major)}
                    Both are taken of `.grad` as it stood before the optimizer stepped: after whatever the program did
                    to it since its backward pass (`clip_grad_norm_`, `GradScaler.unscale_`).
    clips           [{"norm": number, "limit": number}, …]: norms that the program clipped in this step; optional
    roots           {name: type}: the modules at the top. Names below start with "<root>." where there are several
    modules         {path: {"type", "training"}}; the root itself is "" where there is one
    parameters      {name: {"shape", "dtype", "requires_grad", "tied_to"?, "sharded"?}}; `tied_to`: the same tensor as
                    the parameter of that name, and only stored there. Tensors that an optimizer holds and no module
                    has are "parameter.<place in the optimizer>"
    buffers         {name: {"shape", "dtype", "before", "tied_to"?}}; `before`: whether the value is surely the one
                    before the forward pass
    optimizer       null, or {"type", "param_groups": [{"params": [parameter, …], <option>: tree, …}, …],
                    "state": {parameter: {key: tree}}}; tensors of the trees are in optimizer.safetensors
    batches         [tree, …]: what data loaders yielded for this step, in order
    calls           [{"root": name, "args": tree, "kwargs": tree, "autocast": {device type: dtype}}, …]: calls of the
                    root modules in this step with gradients enabled, in order
    locals          {name: tree}: data in the frames of the user's code that took the step; only of programs that
                    had no batch from a data loader
    modified        whether a tensor of `batches` or `calls` was changed in place after it was noted, so that its value
                    here is not the one that the model saw
    left_out        what is not in the capsule because it was too large, in sentences
    generators      {"batches": [state, …], "calls": [state, …]}: as they stood when each batch was delivered, and when
                    each call began. state: {"torch": {"cpu": key, "cuda:0": key, …}, "numpy"?: {"keys": key, "pos",
                    "has_gauss", "cached_gaussian"}, "python"?: {"state": key, "gauss_next"}}. Of a call before which a
                    batch was delivered in the same step only torch's are noted. Keys of numpy are uint32 words (624),
                    those of python likewise (625, the last one the position), little-endian
    scaler          null, or a tree: state_dict of the GradScaler
    schedulers      [{"type", "state": tree}, …]
    settings        see `settings_now` in frameworks/torch/_capture.py: threads, determinism, precision, autocast
    versions        {"isograd", "torch", "python", "numpy", …}
    command         the program's arguments, as in sys.argv
    statistics      {name: the last rows of the run}, `diagnosis`: as `diagnose --json`; both may be {}

A reader takes nothing of it on trust: paths in a capsule are never followed, files that are links are refused, names of
tensors are names and no paths, and a type's name is only text.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from isograd._errors import CapsuleUnreadable
from isograd._tree import TreeError, number_of

SCHEMA = 1
"""Number of the format; a reader understands this one and all before it."""

FOLDER = "capsules"
"""Where they are within the folder of a run."""

FACTS = "capsule.json"
TENSORS = ("model", "optimizer", "batch", "generators")
"""The safetensors files of a capsule, without their ending."""

_LARGEST_FACTS = 64_000_000  # bytes: the names, shapes and hashes of 100,000 parameters are 30 MB
_LONGEST_NAME = 200  # characters of a name that is shown to people

_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "run": str, "subject": str, "written": str, "action": str, "why": list, "grad_norms": dict, "grad_hashes": dict,
    "clips": list, "roots": dict, "modules": dict, "parameters": dict, "buffers": dict,
    "optimizer": (dict, type(None)), "batches": list, "calls": list, "locals": dict, "modified": bool,
    "left_out": list, "generators": dict, "scaler": (dict, type(None)), "schedulers": list, "settings": dict,
    "versions": dict, "command": list, "statistics": dict, "diagnosis": dict,
}  # fmt: skip
"""What each fact is. All but `subject` and `why` may be missing: then it is the empty one of its type, or None."""


@dataclass(frozen=True, kw_only=True)
class Capsule:
    """One captured step. What is not described here stands in `facts`, as this module's docstring says.

    `why`: what was out of range, each {"channel", "layer", "observed", "limit"}; `observed` and `limit` floats, `limit`
    None where there is none. `loss`: NaN where it is not known. `bytes`: what its files take. `damage`: why it cannot
    be read, in one sentence; only in what `list_capsules` gives, empty when all is well.
    """

    path: Path
    run: str = ""
    subject: str = ""
    step: int = -1
    why: tuple[Mapping[str, Any], ...] = ()
    action: str = ""
    loss: float = math.nan
    bytes: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    damage: str = ""

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of reasons that it was captured for: a channel, and "-nonfinite" behind it for NaN and infinity."""
        return frozenset(_kind(reason) for reason in self.why)

    def file(self, name: str) -> Path:
        """The safetensors file with that name, one of `TENSORS`. Raises CapsuleUnreadable if it is none, or a link."""
        path = self.path / f"{name}.safetensors"
        _require_file(path)
        return path

    def tensors(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) by name of the tensors in a file, from its header: nothing of them is read.

        Raises CapsuleUnreadable.
        """
        return _header(self.file(name))

    def replay(self, step_fn: Callable[[Any], Any], *, model: Any, optimizer: Any = None) -> Any:
        """The step once more: see `isograd.frameworks.torch._replay.replay`, which does it."""
        # By name: a capsule is read without a framework, and replayed with the one that wrote it.
        return import_module("isograd.frameworks.torch._replay").replay(self, step_fn, model=model, optimizer=optimizer)


def open_capsule(path: str | os.PathLike[str]) -> Capsule:
    """The capsule at `path`, its facts checked for their types and the headers of its tensors for their sizes.

    Raises CapsuleUnreadable, in one sentence.
    """
    capsule = _read(Path(path))
    for name in TENSORS:
        capsule.tensors(name)
    return capsule


def list_capsules(run: str | os.PathLike[str]) -> tuple[Capsule, ...]:
    """The capsules of a run's folder in the order of their steps; one that cannot be read says why in `damage`.

    Headers of tensors are not looked at. A run without capsules has none: an empty tuple.
    """
    found = [_read_or_damaged(path) for path in _folders_in(Path(run) / FOLDER)]
    return tuple(sorted(found, key=lambda capsule: (capsule.step, capsule.path.name)))


def _read_or_damaged(path: Path) -> Capsule:
    try:
        return _read(path)
    except CapsuleUnreadable as error:
        return Capsule(path=path, bytes=_size(path), damage=str(error))


def _folders_in(folder: Path) -> list[Path]:
    """The folders within `folder` that look like capsules: no links, nothing hidden. Empty where there is none."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.name.startswith("step-") and e.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]


# ---- reading --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Capsule:
    facts = _facts(path)
    try:
        return Capsule(
            path=path,
            run=_shown(facts["run"]),
            subject=_shown(facts["subject"]),
            step=facts["step"],
            why=tuple(_reason(reason) for reason in facts["why"]),
            action=_shown(facts["action"]),
            loss=math.nan if facts.get("loss") is None else number_of(facts["loss"]),
            bytes=_size(path),
            facts=facts,
        )
    except TreeError as error:
        raise CapsuleUnreadable(f"{path} is no capsule that isograd wrote: {error} where one should be.") from error


def _facts(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        facts = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CapsuleUnreadable(f"{path / FACTS} is damaged: it is not the JSON of a capsule.") from error
    if not isinstance(facts, dict) or type(facts.get("schema")) is not int or facts["schema"] < 1:
        raise CapsuleUnreadable(f"{path / FACTS} is not the JSON of a capsule: it names no schema.")
    if facts["schema"] > SCHEMA:
        raise CapsuleUnreadable(f"{path} was written by a newer isograd; upgrade to read it.")
    return _checked(path, facts)


def _checked(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """`facts` with what is missing filled in, or CapsuleUnreadable."""
    for name in ("step", "subject", "why"):
        if name not in facts:
            raise CapsuleUnreadable(f"{path / FACTS} is no capsule that isograd wrote: it has no {name}.")
    if type(facts["step"]) is not int or not 0 <= facts["step"] < 2**63:
        raise CapsuleUnreadable(f"{path / FACTS} is no capsule that isograd wrote: its step is no number of a step.")
    for name, kind in _TYPES.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(facts.setdefault(name, None if len(kinds) > 1 else kinds[0]()), kinds):
            raise CapsuleUnreadable(f"{path / FACTS} is no capsule that isograd wrote: its {name} is of another type.")
    return facts


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _text(path: Path) -> bytes:
    if not path.is_dir():
        raise CapsuleUnreadable(f"{path} is no capsule: there is no such folder; name a folder in <run>/{FOLDER}.")
    for name in TENSORS:
        _require_file(path / f"{name}.safetensors")
    _require_file(path / FACTS)
    try:
        with (path / FACTS).open("rb") as file:
            text = file.read(_LARGEST_FACTS + 1)
    except OSError as error:
        raise CapsuleUnreadable(f"{path / FACTS} cannot be read: {error.strerror}.") from error
    if len(text) > _LARGEST_FACTS:
        raise CapsuleUnreadable(f"{path / FACTS} is larger than the {_LARGEST_FACTS // 10**6} MB that one may be.")
    return text


def _require_file(path: Path) -> None:
    """Raise CapsuleUnreadable unless `path` is a plain file: no link, which could lead anywhere, and no pipe."""
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError) as error:
        raise CapsuleUnreadable(f"{path.parent} is no whole capsule: {path.name} is missing.") from error
    if not stat.S_ISREG(mode):
        raise CapsuleUnreadable(f"{path.parent} is no capsule that isograd wrote: {path.name} is no plain file.")


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    try:
        # Checks that the header is whole, and that shapes, types and the file's size agree; maps, and reads nothing.
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return {name: (str(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CapsuleUnreadable(f"{path} is damaged or no safetensors file.") from error


def _size(path: Path) -> int:
    """Bytes of the files in a folder, links not followed."""
    try:
        with os.scandir(path) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
    except OSError:
        return 0


def _reason(reason: Any) -> dict[str, Any]:
    if not isinstance(reason, dict):
        raise TreeError("no reason")
    layer, limit = reason.get("layer"), reason.get("limit")
    return {
        "channel": _shown(reason.get("channel")),
        "layer": None if layer is None else _shown(layer),
        "observed": number_of(reason.get("observed")),
        "limit": None if limit is None else number_of(limit),
    }


def _kind(reason: Mapping[str, Any]) -> str:
    observed = reason["observed"]
    return (
        f"{reason['channel']}-nonfinite"
        if observed != observed or abs(observed) == float("inf")
        else str(reason["channel"])
    )


def _shown(name: Any) -> str:
    """A name that people will see: what could steer a terminal is spelled out. Raises TreeError if it is no text."""
    if not isinstance(name, str):
        raise TreeError("no name")
    return "".join(_printable(name[:_LONGEST_NAME]))


def _printable(text: str) -> Iterator[str]:
    for character in text:
        yield character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
