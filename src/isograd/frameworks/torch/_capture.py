"""What a capsule holds of a step (`_capsule.py` describes it): gathered by reference, copied, and written."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isograd import _tree as tree_format
from isograd._capsule import TENSORS
from isograd._tree import keys_in, number
from isograd.frameworks.torch import _calls as calls
from isograd.frameworks.torch import _generators as generators
from isograd.frameworks.torch import _named_state as state
from isograd.frameworks.torch._fingerprint import fingerprint
from isograd.frameworks.torch._notes import Notes, is_storable, storable
from isograd.frameworks.torch._ring import Moments
from isograd.frameworks.torch._source import is_users

Facts = dict[str, Any]


@dataclass(kw_only=True)
class Picture:
    """A step on its way to a capsule. `tensors`: by file and name; `gradients`: by parameter."""

    facts: Facts
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {name: {} for name in TENSORS})
    gradients: dict[str, Tensor] = field(default_factory=dict)
    # What nobody else writes to, and so is not copied. By id(), and held so that the id stays its own.
    owned: dict[int, Tensor] = field(default_factory=dict)
    _events: list[Any] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """What the tensors take on disk."""
        return sum(t.numel() * t.element_size() for held in self.tensors.values() for t in held.values())

    def copy(self) -> None:
        """Copy what the program may change from now on, where it is; to the host where its device has no room."""
        held = [*self.tensors.values(), self.gradients]
        is_roomy = _is_roomy([tensor for tensors in held for tensor in tensors.values()])
        for tensors in held:
            for name, tensor in tensors.items():
                if id(tensor) not in self.owned:
                    tensors[name] = tensor.detach().clone() if is_roomy else tensor.detach().to("cpu", copy=True)
        self._events = list(_events([tensor for tensors in held for tensor in tensors.values()]))

    def wait(self) -> None:
        """Return when the copies have been made. For another thread than the program's."""
        for event in self._events:
            event.synchronize()

    def fingerprint(self) -> None:
        """Add norms and hashes of the gradients to the facts."""
        found = {name: fingerprint(gradient) for name, gradient in self.gradients.items()}
        self.facts["grad_norms"] = {name: number(norm) for name, (norm, _) in found.items()}
        self.facts["grad_hashes"] = {name: digest for name, (_, digest) in found.items()}
        self.gradients.clear()

    def write(self, folder: Path) -> None:
        """Write the safetensors files."""
        from safetensors.torch import save_file

        for file, tensors in self.tensors.items():
            save_file({name: storable(tensor) for name, tensor in tensors.items()}, folder / f"{file}.safetensors")


def _is_roomy(tensors: Sequence[Tensor]) -> bool:
    """Whether accelerators have twice the room that copies take; the host is always asked."""
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        size = sum(t.numel() * t.element_size() for t in tensors if t.device == device)
        if torch.cuda.mem_get_info(device)[0] < 2 * size:
            return False
    return True


def _events(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """What tells that the work given to accelerators so far is done."""
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        cuda: Any = torch.cuda
        event = cuda.Event()
        event.record(cuda.current_stream(device))
        yield event


# ---- gathering ------------------------------------------------------------------------------------------------------


def gather(
    *,
    moments: Moments,
    roots: Mapping[str, nn.Module],
    optimizer: Optimizer | None,
    buffers: Mapping[str, Tensor],
    frame: FrameType | None,
    limit: int,
) -> Picture:
    """What there is of a step, by reference. `limit`: bytes of data that may be taken from frames."""
    names = state.names_of(roots, optimizer)
    picture = Picture(facts=_about_now(roots))
    model, others = state.Copies(torch.Tensor.detach), state.Copies(torch.Tensor.detach)
    picture.facts |= state.describe_model(names, model, buffers)
    picture.facts["optimizer"] = None if optimizer is None else state.describe_optimizer(optimizer, names, others)
    picture.tensors["model"], picture.tensors["optimizer"] = model.tensors, others.tensors
    picture.gradients = {name: state.local(t.grad) for name, t in names.parameters.items() if t.grad is not None}
    _add_data(picture, moments)
    _add_generators(picture, moments)
    if not moments.batches:
        _add_locals(picture, frame, limit)
    return picture


def _about_now(roots: Mapping[str, nn.Module]) -> Facts:
    return {
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "roots": {name: type(module).__name__ for name, module in roots.items()},
        "settings": settings_now(),
        "versions": versions(),
        "command": list(sys.argv),
        "locals": {},
    }


def _add_data(picture: Picture, moments: Moments) -> None:
    leaves = moments.leaves()
    facts = picture.facts
    facts["batches"] = [batch.data.tree for batch in moments.batches]
    facts["calls"] = [
        {"root": call.root, "args": call.args.tree, "kwargs": call.kwargs.tree, "autocast": call.autocast}
        for call in moments.calls
    ]
    facts["modified"] = any(kept.is_modified for kept in leaves.values())
    facts["left_out"] = list(_left_out(moments))
    for key in keys_in([facts["batches"], facts["calls"]]):
        kept = leaves[key]
        picture.tensors["batch"][key] = kept.data
        if kept.is_copy:
            picture.owned[id(kept.data)] = kept.data
    if moments.calls:
        facts["settings"]["autocast"] = moments.calls[0].autocast


def _left_out(moments: Moments) -> Iterator[str]:
    if moments.batches_dropped:
        yield f"{moments.batches_dropped} batches of this step: they were too many or too large to be held"
    if moments.calls_dropped:
        yield f"{moments.calls_dropped} calls of this step: they were too many or too large to be held"


def _add_generators(picture: Picture, moments: Moments) -> None:
    stored = picture.tensors["generators"]
    keys: dict[bytes, str] = {}

    def keep(held: Tensor) -> str:
        key = keys.setdefault(held.numpy().tobytes(), str(len(keys)))
        stored[key] = held
        picture.owned[id(held)] = held
        return key

    picture.facts["generators"] = {
        "batches": [generators.encode(batch.generators, keep) for batch in moments.batches],
        "calls": [None if c.generators is None else generators.encode(c.generators, keep) for c in moments.calls],
    }


# ---- programs without a loader --------------------------------------------------------------------------------------


def _add_locals(picture: Picture, frame: FrameType | None, limit: int) -> None:
    notes, left = Notes(copied=0), limit
    found = {name: notes.note(value) for name, value in _data_in_frames(frame).items()}
    for name, noted in sorted(found.items(), key=lambda item: item[1].bytes):
        left -= noted.bytes
        if left < 0:
            picture.facts["left_out"].append(f"{name} of the frames of the program: {noted.bytes:,} bytes")
            continue
        renamed = {key: f"locals/{key}" for key in noted.leaves}
        picture.facts["locals"][name] = _renamed(noted.tree, renamed)
        picture.tensors["batch"] |= {renamed[key]: kept.data for key, kept in noted.leaves.items()}


def _renamed(tree: Any, keys: Mapping[str, str]) -> Any:
    if isinstance(tree, list):
        return [_renamed(item, keys) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {k: keys.get(v, v) if k in ("tensor", "array") else _renamed(v, keys) for k, v in tree.items()}


def _data_in_frames(frame: FrameType | None) -> dict[str, Any]:
    """Numbers and data in the frames of the user's code below `frame`, by name; those of inner frames count first."""
    found: dict[str, Any] = {}
    for outer, _ in traceback.walk_stack(frame) if frame is not None else ():
        if is_users(outer.f_code.co_filename):
            for name, value in list(outer.f_locals.items()):
                if not name.startswith("__") and _is_data(value, 2):
                    found.setdefault(name, value)
    return found


def _is_data(value: Any, depth: int) -> bool:
    """Whether a value came from outside the model: numbers, tensors without a history, and what is made of them."""
    if isinstance(value, Tensor):
        return calls.is_data(value) and is_storable(value)
    if isinstance(value, (list, tuple)) and 0 < len(value) <= 64 and depth:
        return all(_is_data(item, depth - 1) for item in value)
    if isinstance(value, dict) and 0 < len(value) <= 64 and depth:
        return all(_is_data(item, depth - 1) for item in value.values())
    return type(value) in (bool, int, float) or isinstance(value, (np.ndarray, np.number))


# ---- what else decides about bits -----------------------------------------------------------------------------------


def settings_now() -> Facts:
    """What decides, besides the program, which bits a step computes: threads, determinism, precision, autocast."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    cuda: Any = torch.backends.cuda
    device: Any = torch.cuda
    return {
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "cudnn": {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic,
                  "allow_tf32": cudnn.allow_tf32},
        "mkldnn": bool(mkldnn.enabled) if hasattr(mkldnn, "enabled") else None,
        "attention": {"flash": cuda.flash_sdp_enabled(), "math": cuda.math_sdp_enabled(),
                      "memory_efficient": cuda.mem_efficient_sdp_enabled(), "cudnn": cuda.cudnn_sdp_enabled()},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "devices": [device.get_device_name(i) for i in range(device.device_count())] if device.is_initialized() else [],
        "autocast": autocast_now(),
    }  # fmt: skip


def autocast_now() -> dict[str, str]:
    """Device type -> dtype, of those for which autocast is on in this thread."""
    return {
        kind: str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    }


def versions() -> dict[str, str | None]:
    """Of what computed the step."""
    python = ".".join(str(part) for part in sys.version_info[:3])
    return {
        "isograd": getattr(sys.modules["isograd"], "__version__", None),
        "torch": torch.__version__,
        "python": python,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
    }


# ---- what the caller knows ------------------------------------------------------------------------------------------


def reasons(why: Sequence[Any]) -> list[Facts]:
    """The fact `why`, from things with `channel`, `layer`, `observed` and `limit`."""
    return [
        {
            "channel": str(each.channel),
            "layer": None if each.layer is None else str(each.layer),
            "observed": number(float(each.observed)),
            "limit": None if each.limit is None else number(float(each.limit)),
        }
        for each in why
    ]


def states_of(things: Sequence[Any]) -> list[Facts]:
    """The fact `schedulers`, of things with `state_dict`."""
    return [{"type": type(thing).__name__, "state": state_tree(thing)} for thing in things]


def state_tree(thing: Any) -> tree_format.Tree:
    """The state_dict of a scheduler or scaler as a tree; its tensors, which are numbers, become numbers."""
    return tree_format.encode(thing.state_dict(), _plain_number)


def _plain_number(value: Any) -> tree_format.Tree | None:
    if isinstance(value, (Tensor, np.generic)) and value.size in ((), 1, torch.Size([])):
        return tree_format.encode(value.item())
    return None


def plain(value: Any) -> Any:
    """Facts from elsewhere as JSON: numbers that are not finite by name, arrays as lists, the rest as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return plain(value.tolist())
    if isinstance(value, float):
        return number(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


Later = Callable[[], Mapping[str, Any]]
"""Facts that take a while: asked for on the thread that writes."""
