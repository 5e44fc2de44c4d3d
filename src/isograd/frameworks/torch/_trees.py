"""Tensors and arrays in nested data: how a tree (`_tree.py`) names them, and making them again.

{"tensor": key, "device", "stride"?, "complex"?, "requires_grad"?}     strided tensors; `stride` where not row-major
{"sparse": layout, "size": […], "parts": {name: {"tensor": …}, …}, "coalesced"?}     COO, CSR, CSC
{"array": key, "dtype": "<f4", "shape": […], "scalar"?}                NumPy; the bytes are stored as uint8
{"dtype": "float32"} {"device": "cuda:0"}                              torch's own values
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isograd import _tree as tree_format
from isograd._capsule import Capsule
from isograd._errors import CapsuleUnreadable
from isograd._tree import Tree, TreeError

SPARSE: Mapping[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("indices", "values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
}
ARRAY_DTYPE = re.compile(r"[<>|=][biufcSUmM]\d{1,4}(\[\d*\w{1,2}\])?")
_TRUSTED: Mapping[str, type] = {
    tree_format.type_name(cls): cls for cls in (torch.Size, nn.utils.rnn.PackedSequence, collections.OrderedDict)
}


def tensors_of(capsule: Capsule, name: str) -> dict[str, Tensor]:
    """The tensors of one of a capsule's files, on the host. Raises CapsuleUnreadable."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = capsule.file(name)
    try:
        return {name: _own(tensor) for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, OverflowError) as error:
        raise CapsuleUnreadable(f"{path} is damaged or no safetensors file.") from error


def _own(tensor: Tensor) -> Tensor:
    """A copy, byte by byte: in a file numbers may lie anywhere, and kernels for complex ones crash where they do."""
    return tensor.reshape(-1).view(torch.uint8).clone().view(tensor.dtype).reshape(tensor.shape)


def trusted(name: str) -> type | None:
    """Torch's and Python's own classes that batches are made of."""
    return _TRUSTED.get(name)


def decode(
    tree: Any,
    tensors: Mapping[str, Tensor],
    *,
    device: torch.device | str | None = None,
    find: Callable[[str], type | None] = trusted,
) -> Any:
    """The data of a tree with the tensors of its file. `device`: where to; None: where they were, else the host.

    Each tensor is a copy, so that a step may write to it. What was not kept is None. Raises TreeError.
    """
    made: dict[str, Tensor] = {}

    def leaf(node: Tree) -> Any:
        if "tensor" in node:
            key = f"{node['tensor']} {node.get('requires_grad')} {node.get('stride')}"
            if key not in made:
                made[key] = _tensor_of(node, tensors, device)
            return made[key]
        if "sparse" in node:
            return _sparse_of(node, tensors, device)
        if "array" in node:
            return _array_of(node, tensors)
        return _value_of(node)

    return tree_format.decode(tree, leaf, find)


def _stored(key: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    if not isinstance(key, str) or key not in tensors:
        raise TreeError(f"a tensor {str(key)[:40]!r} that the file does not hold")
    return tensors[key]


def _tensor_of(node: Tree, tensors: Mapping[str, Tensor], device: torch.device | str | None) -> Tensor:
    held = _stored(node["tensor"], tensors)
    if node.get("complex"):
        if held.dim() < 1 or held.shape[-1] != 2 or held.dtype not in (torch.float32, torch.float64):
            raise TreeError("a complex tensor of no pairs")
        held = torch.view_as_complex(held.contiguous())
    held = _with_stride(held, node.get("stride")).to(_device(node.get("device"), device))
    return held.requires_grad_() if node.get("requires_grad") and _has_gradient(held) else held


def _has_gradient(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _with_stride(held: Tensor, stride: Any) -> Tensor:
    """A copy with these strides, where they lay out the same numbers without gaps or overlaps; row-major otherwise."""
    if isinstance(stride, list) and len(stride) == held.dim() and all(type(s) is int and s > 0 for s in stride):
        spans = sorted((s, n) for s, n in zip(stride, held.shape, strict=True) if n > 1)
        if [s for s, _ in spans] == [math.prod(n for _, n in spans[:i]) for i in range(len(spans))]:
            return torch.empty_strided(held.shape, stride, dtype=held.dtype).copy_(held)
    return held.clone(memory_format=torch.contiguous_format)


def _device(name: Any, wanted: torch.device | str | None) -> torch.device:
    if wanted is not None:
        return torch.device(wanted)
    try:
        device = torch.device(name)
        count = torch.get_device_module(device.type).device_count()
        return device if (device.index or 0) < count else torch.device("cpu")
    except (RuntimeError, TypeError, AttributeError):
        return torch.device("cpu")


def _sparse_of(node: Tree, tensors: Mapping[str, Tensor], device: torch.device | str | None) -> Any:
    layout = next((each for each in SPARSE if str(each) == f"torch.{node['sparse']}"), None)
    size, parts = node.get("size"), node.get("parts")
    if layout is None or not isinstance(parts, dict) or not isinstance(size, list):
        raise TreeError("a sparse tensor of no known layout")
    held = [_tensor_of(parts.get(name) or {"tensor": None}, tensors, device) for name in SPARSE[layout]]
    make: Any = getattr(torch, f"{node['sparse']}_tensor")
    state = {"is_coalesced": bool(node.get("coalesced"))} if layout == torch.sparse_coo else {}
    try:
        return make(*held, size, check_invariants=True, **state)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise TreeError("a sparse tensor whose parts do not fit") from error


def _array_of(node: Tree, tensors: Mapping[str, Tensor]) -> Any:
    held = _stored(node["array"], tensors)
    name, shape = node.get("dtype"), node.get("shape")
    try:
        if not isinstance(name, str) or not ARRAY_DTYPE.fullmatch(name) or held.dtype != torch.uint8:
            raise TreeError("an array of no known type")
        array = np.frombuffer(held.contiguous().numpy().tobytes(), np.dtype(name)).reshape(shape).copy()
    except (ValueError, TypeError, OverflowError) as error:
        raise TreeError("an array whose bytes do not fit its shape") from error
    return array[()] if node.get("scalar") and array.ndim == 0 else array


def _value_of(node: Tree) -> Any:
    if isinstance(node.get("dtype"), str):
        found = getattr(torch, node["dtype"], None)
        return found if isinstance(found, torch.dtype) else None
    if isinstance(node.get("device"), str):
        return _device(node["device"], None)
    if "opaque" in node:
        return None
    raise TreeError("a node of no known kind")
