"""Noting nested data while the program goes on: which tensors it holds, and their values (trees: `_trees.py`)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isograd import _tree as tree_format
from isograd._tree import Tree
from isograd.frameworks.torch._trees import ARRAY_DTYPE, SPARSE

SMALL = 2**20
"""Bytes of a step's data that are copied when they are noted (40 us for 1 MiB); what is more is kept by reference."""

_PLAIN = (Tensor, nn.Parameter)
_STORED = frozenset(
    getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
                 "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128")
    if hasattr(torch, name)
)  # fmt: skip


@dataclass
class Kept:
    """A tensor or array that was noted. `data`: what will be stored: a copy, or the program's own tensor.

    `source`: the program's tensor without its graph, held so that no other takes its place in memory meanwhile.
    `version`: how often it had been written to; of an array kept by reference a checksum of a part.
    """

    data: Tensor
    source: Any
    version: int | None
    is_copy: bool

    @property
    def is_modified(self) -> bool:
        """Whether what will be stored was written to since it was noted, as far as that can be known."""
        return not self.is_copy and self.version != _version(self.source)

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return self.data.numel() * self.data.element_size()

    @property
    def bytes(self) -> int:
        """What it keeps from being freed: the whole storage of what is no copy."""
        return self.data.untyped_storage().nbytes()

    @property
    def place(self) -> int:
        """Where its storage lies; two with the same are views of the same memory."""
        return int(self.data.untyped_storage().data_ptr())

    @property
    def is_shared_memory(self) -> bool:
        """Whether it lies in memory shared with another process: few bytes are free there, and files stay open."""
        return self.data.device.type == "cpu" and self.data.is_shared()  # type: ignore[no-untyped-call]


class Noted:
    """Nested data as it was noted: its tree, and what its keys stand for."""

    __slots__ = ("leaves", "places", "tree")

    def __init__(self, tree: Tree, leaves: dict[str, Kept], places: set[int]) -> None:
        self.tree, self.leaves, self.places = tree, leaves, places

    @property
    def bytes(self) -> int:
        """Of all values in it."""
        return sum([kept.size for kept in self.leaves.values()])


class Notes:
    """Notes nested data of one step; the same tensor twice is kept once. `copied`: at most so many bytes are copied."""

    def __init__(self, copied: int = SMALL) -> None:
        self._copied = copied
        self._left = copied
        self._count = 0
        self._known: dict[tuple[Any, ...], tuple[str, Kept]] = {}
        self._leaves: dict[str, Kept] = {}
        self._places: set[int] = set()

    def note(self, value: Any) -> Noted:
        """`value` as it is now."""
        self._leaves, self._places = {}, set()
        tree = tree_format.encode(value, self._leaf)
        return Noted(tree, self._leaves, self._places)

    def begin_step(self) -> None:
        """Forget which tensors were seen; others may lie in their place from now on."""
        self._known.clear()
        self._left = self._copied

    def _leaf(self, value: Any) -> Tree | None:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (np.ndarray, np.generic)):
            return self._array(value)
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        return None

    def _tensor(self, tensor: Tensor) -> Tree | None:
        if type(tensor) not in _PLAIN:
            if not _is_plain(tensor):
                return None
            with torch._C.DisableTorchFunctionSubclass():
                tensor = tensor.as_subclass(Tensor)
        if tensor.layout in SPARSE:
            return self._sparse(tensor)
        if not is_storable(tensor):
            return None
        tree: Tree = {"tensor": self._keep(tensor), "device": str(tensor.device)}
        if tensor.requires_grad:
            tree["requires_grad"] = True
        if tensor.is_complex():
            tree["complex"] = True
        if not tensor.is_contiguous():
            tree["stride"] = list(tensor.stride())
        return tree

    def _sparse(self, tensor: Tensor) -> Tree:
        held: Any = tensor.detach()
        names = SPARSE[tensor.layout]
        # The methods of a COO tensor ask for it to be coalesced, which would make another one.
        parts = {name: getattr(held, f"_{name}" if tensor.layout == torch.sparse_coo else name)() for name in names}
        trees = {name: self._tensor(part) for name, part in parts.items()}
        state = {"coalesced": held.is_coalesced()} if tensor.layout == torch.sparse_coo else {}
        return {
            "sparse": str(tensor.layout).removeprefix("torch."),
            "size": list(tensor.shape),
            "parts": trees,
            **state,
        }

    def _keep(self, tensor: Tensor) -> str:
        source = tensor.detach()
        version = _version(source)
        signature = source.data_ptr(), source.dtype, source.shape, source.stride(), source.device, version
        self._places.add(source.untyped_storage().data_ptr())
        if signature not in self._known:
            size = source.numel() * source.element_size()
            is_copy = size <= self._left
            if is_copy:
                self._left -= size
            # A copy has the source's strides: kernels choose by them.
            kept = Kept(source.clone() if is_copy else source, source, version, is_copy)
            self._known[signature] = self._new_key(), kept
        key, kept = self._known[signature]
        self._leaves[key] = kept
        return key

    def _array(self, array: Any) -> Tree | None:
        values = np.asarray(array)
        if not ARRAY_DTYPE.fullmatch(values.dtype.str):
            return None
        is_copy = values.nbytes <= self._left or not values.flags.c_contiguous
        if is_copy:
            self._left -= min(values.nbytes, self._left)
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8) if values.nbytes else np.empty(0, np.uint8)
        raw = raw.copy() if is_copy or not raw.flags.writeable else raw
        key = self._new_key()
        self._leaves[key] = Kept(torch.from_numpy(raw), raw, _version(raw), is_copy)
        tree: Tree = {"array": key, "dtype": values.dtype.str, "shape": list(values.shape)}
        return {**tree, "scalar": True} if isinstance(array, np.generic) else tree

    def _new_key(self) -> str:
        self._count += 1
        return str(self._count)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a subclass is a tensor with a name of its own, and not a wrapper around other ones."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def is_storable(tensor: Tensor) -> bool:
    """Whether a tensor has values of its own that a safetensors file can hold."""
    return tensor.layout == torch.strided and tensor.device.type != "meta" and tensor.dtype in _STORED and not (
        tensor.is_quantized or tensor.is_nested or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )  # fmt: skip


def _version(source: Any) -> int | None:
    """What changes when a tensor is written to, or a large array nearly everywhere."""
    if isinstance(source, Tensor):
        return None if source.is_inference() else source._version
    return zlib.crc32(source[:: source.nbytes // 4096 | 1].tobytes())  # odd, so that all bytes of numbers are met


def storable(tensor: Tensor) -> Tensor:
    """`tensor` as it is stored: on the host, row-major, complex numbers as pairs."""
    held = tensor.detach()
    if held.is_complex():
        held = torch.view_as_real(held.resolve_conj())
    return held.resolve_neg().cpu().contiguous()
