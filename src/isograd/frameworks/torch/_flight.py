"""The flight recorder: what the last steps were given, and a capsule of a step that went wrong.

While a program trains, the recorder notes what its data loaders yield, how its root modules are called and where its
generators stand (`_ring.py`). Of a bad step it copies model, optimizer, gradients and data where they are, and leaves
the rest to a thread: hashing, and writing to the disk.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from isograd._capsule import FOLDER, SCHEMA
from isograd._capsule_folder import Limits, capsule_name, free_path, prune, sweep, write_capsule
from isograd._record import _at_exit
from isograd._tree import number
from isograd.frameworks import Shield
from isograd.frameworks.torch import _capture as capture
from isograd.frameworks.torch import _generators as generators
from isograd.frameworks.torch import _loaders as loaders
from isograd.frameworks.torch._call_hook import CallHook, is_plain
from isograd.frameworks.torch._capture import Later, Picture
from isograd.frameworks.torch._ring import Batch, Call, Ring

RING = 256 * 2**20
"""Bytes of the last steps' data that are held."""

_AT_ONCE = 2  # capsules on their way to the disk: each is a copy of model, optimizer and gradients
_PATIENCE = 120.0  # seconds that the end of a program waits for capsules to be written


class FlightRecorder:
    """Notes what steps are given, and writes capsules into `folder`, the folder of a run; None: there is none, and
    nothing is written.

    `ring`: bytes of the last steps' data that are held. `limits`: what the run's capsules may take. `on_warning` hears
    one sentence of each kind of trouble, from any thread. What the program calls runs inside `shield`; `end_step` and
    `capture` are for callers that are inside already. Draws no random number, and changes nothing.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        ring: int = RING,
        limits: Limits | None = None,
        on_warning: Callable[[str], None],
        shield: Shield,
    ) -> None:
        self._folder = None if folder is None else folder / FOLDER
        self._limits = Limits() if limits is None else limits
        self._on_warning, self._shield = on_warning, shield
        self.ring = Ring(ring)
        self._roots: dict[int, tuple[str, RemovableHandle]] = {}
        self._devices: list[torch.device] = []
        # Which iterator yielded a batch. Not by id(): an iterator often gets that of the one that was freed before it.
        self._sources: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._numbers = itertools.count()
        self._trained: set[int] = set()
        self._told: set[str] = set()
        self._writing: list[threading.Thread] = []
        self._promised: set[Path] = set()
        self._process, self._thread = os.getpid(), threading.get_ident()
        self._forget_exit: Callable[[], None] | None = None

    # ---- life -----------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Hear of batches that this thread takes from now on; remove what killed writers left in the runs beside."""
        self._thread = threading.get_ident()
        loaders.subscribe(self._deliver)
        if self._folder is not None:
            root = self._folder.parent.parent
            threading.Thread(target=sweep, args=(root,), name="isograd-sweep", daemon=True).start()

    def follow(self, roots: Mapping[str, nn.Module]) -> None:
        """Note how these modules are called from now on; those that are compiled or scripted are left alone."""
        for name, root in roots.items():
            if id(root) not in self._roots and is_plain(root):
                hook = CallHook(self._shield, self._note_call, name)
                handle = root.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
                self._roots[id(root)] = name, handle
        tensors = [next(root.parameters(), None) for root in roots.values()]
        found = {t.device for t in tensors if t is not None and t.device.type not in ("cpu", "meta")}
        self._devices = sorted({*self._devices, *found}, key=str)

    def stop(self) -> None:
        """Hear of nothing any more; what was noted is still there."""
        loaders.unsubscribe(self._deliver)
        for _, handle in self._roots.values():
            handle.remove()
        self._roots.clear()

    def close(self) -> None:
        """Stop, and wait until all capsules are written."""
        self.stop()
        if os.getpid() == self._process:
            self.join()
        if self._forget_exit is not None:
            self._forget_exit()
            self._forget_exit = None

    def join(self) -> None:
        """Wait until all capsules are written, 2 minutes at the longest."""
        for thread in list(self._writing):
            thread.join(_PATIENCE)
            if thread.is_alive():
                self._warn("slow", "a capsule could not be written within 2 minutes: it is left out")

    # ---- what is heard --------------------------------------------------------------------------------------------

    def _deliver(self, source: Any, batch: Any) -> None:
        self._shield.call(self._note_batch, source, batch)

    def _note_batch(self, source: Any, batch: Any) -> None:
        if threading.get_ident() != self._thread:
            return  # a thread that fetches ahead: what its batches are for, the calls tell
        number = self._sources.get(source)
        if number is None:
            number = self._sources[source] = next(self._numbers)
        state = generators.note(self._devices)
        noted = self.ring.notes.note(batch)
        self.ring.delivered(Batch(number, noted, state, evaluated=not torch.is_grad_enabled()))

    def _note_call(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self._thread or torch._C._current_graph_task_id() != -1:
            return  # a replica of `DataParallel`; checkpointing, which runs it again in the backward pass
        if not self._is_training(module):
            self.ring.evaluated({place for value in (*args, *kwargs.values()) for place in _places(value)})
        elif self.ring.wants_call:
            notes, host = self.ring.notes, not self.ring.has_batches
            state = generators.note(self._devices, host=host)
            autocast = capture.autocast_now()
            self.ring.called(Call(name, notes.note(args), notes.note(kwargs), autocast, state))

    def _is_training(self, module: nn.Module) -> bool:
        """With gradients, and not in evaluation mode if the module was ever seen out of it."""
        if module.training:
            self._trained.add(id(module))
        return torch.is_grad_enabled() and (module.training or id(module) not in self._trained)

    def end_step(self, step: int, subject: str = "") -> None:
        """The subject has taken its step: what was noted since the last one was for it."""
        self.ring.end_step(step, subject)

    # ---- capsules -------------------------------------------------------------------------------------------------

    def capture(
        self,
        *,
        subject: str,
        step: int,
        why: Sequence[Any],
        action: str,
        roots: Mapping[str, nn.Module],
        optimizer: Optimizer | None,
        buffers: Mapping[str, Tensor] | None = None,
        loss: Any = None,
        facts: Mapping[str, Any] | None = None,
        scaler: Any = None,
        schedulers: Sequence[Any] = (),
        several: bool = False,
        later: Later | None = None,
    ) -> Path | None:
        """Copy a step before its optimizer changes anything, and have it written; where the capsule will be.

        `buffers`: by name, as they were before the forward pass. `facts`: further ones of `_capsule.py`; `later`: more,
        asked for on the thread that writes. `several`: the run has several subjects. None where nothing is written:
        there is no folder, two capsules are still being written, it would be too large, or memory is short; all but
        the first two are told to `on_warning`, once each. Raises nothing.
        """
        if self._folder is None or os.getpid() != self._process or not self._has_room_to_write():
            return None
        try:
            with torch.no_grad():
                picture = capture.gather(
                    moments=self.ring.moments_of(step, subject),
                    roots=roots,
                    optimizer=optimizer,
                    buffers=buffers or {},
                    frame=sys._getframe(1),
                    limit=self.ring.limit,
                )
                picture.facts = {
                    "schema": SCHEMA,
                    "run": self._folder.parent.name,
                    "subject": subject,
                    "step": int(step),
                    "why": capture.reasons(why),
                    "action": action,
                    "loss": None if loss is None else number(_float(loss)),
                    **picture.facts,
                    "scaler": None if scaler is None else capture.state_tree(scaler),
                    "schedulers": capture.states_of(schedulers),
                    **capture.plain(facts or {}),
                }
                return self._hand_over(picture, capsule_name(step, subject if several else ""), later)
        except Exception as error:
            self._warn("capture", f"step {step} could not be captured ({_reason(error)}); the training goes on")
            return None

    def _has_room_to_write(self) -> bool:
        self._writing = [thread for thread in self._writing if thread.is_alive()]
        return len(self._writing) < _AT_ONCE

    def _hand_over(self, picture: Picture, name: str, later: Later | None) -> Path | None:
        assert self._folder is not None
        if picture.bytes > self._limits.bytes:
            size, limit = picture.bytes / 2**30, self._limits.bytes / 2**30
            told = f"a capsule of {size:.2f} GiB is more than the {limit:.2f} GiB that all may take: none is written"
            self._warn("size", told)
            return None
        picture.copy()
        path = free_path(self._folder, name, frozenset(self._promised))
        self._promised.add(path)
        before = self._writing[-1] if self._writing else None
        thread = threading.Thread(
            target=self._write, args=(path, picture, later, before), name="isograd-capsule", daemon=True
        )
        if self._forget_exit is None:
            self._forget_exit = _at_exit(self.close)
        thread.start()
        self._writing.append(thread)
        return path

    # ---- on the thread that writes --------------------------------------------------------------------------------

    def _write(self, path: Path, picture: Picture, later: Later | None, before: threading.Thread | None) -> None:
        """Write one capsule after the one before it, and make room for the next."""
        try:
            if before is not None:
                before.join()
            picture.wait()
            with torch.no_grad():
                picture.fingerprint()
                if later is not None:
                    with contextlib.suppress(Exception):
                        picture.facts |= capture.plain(later())
                write_capsule(path, picture.facts, picture.write)
            prune(path.parent.parent, self._limits)
        except Exception as error:
            self._warn("disk", f"{path} cannot be written ({_reason(error)}): the training goes on without")
        finally:
            self._promised.discard(path)

    def _warn(self, kind: str, sentence: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            with contextlib.suppress(Exception):
                self._on_warning(sentence)


def _float(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _places(value: Any) -> list[int]:
    return [value.untyped_storage().data_ptr()] if type(value) is Tensor and value.layout == torch.strided else []


def _reason(error: Exception) -> str:
    said = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(said.split())[:300]
