"""Reads the IDX format of MNIST (LeCun, Cortes & Burges, "The MNIST database"), gzip-compressed or not.

A file is two zero bytes, a byte naming the number type, a byte with the number of axes, the length of each axis as a
big-endian 32-bit integer, then the entries, big-endian, last axis fastest.
"""

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import numpy as np

DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read(path):
    """The array in `path`, in native byte order. Raises ValueError, one sentence, for what is not a whole IDX file."""
    return parse(_content(Path(path)), path)


def parse(content, path="the content"):
    """The array in the bytes `content`; `path` names them in errors."""
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{path} is not an IDX file: it starts with {content[:4].hex(' ') or 'nothing'}, not 00 00")
    code, axes = content[2], content[3]
    if code not in DTYPES:
        known = ", ".join(f"0x{known:02X}" for known in DTYPES)
        raise ValueError(f"{path} has number type 0x{code:02X}, which IDX does not define; it knows {known}")
    start = 4 + 4 * axes
    if len(content) < start:
        raise ValueError(f"{path} is cut off in its header: {len(content)} bytes of {start}")
    shape = struct.unpack_from(f">{axes}I", content, 4)
    dtype = np.dtype(DTYPES[code])
    expected = start + dtype.itemsize * prod(shape)
    if len(content) != expected:
        fault = "is cut off" if len(content) < expected else "is too long"
        raise ValueError(f"{path} {fault}: {len(content)} bytes, but its header {shape} asks for {expected}")
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def read_mnist(folder, split):
    """Images [N, 28, 28] and labels [N] of `split` ("train" or "t10k") under the names that MNIST is published with."""
    images, labels = (
        read(_find(Path(folder), f"{split}-{part}")) for part in ("images?idx3-ubyte", "labels?idx1-ubyte")
    )
    if images.ndim < 2 or labels.shape != images.shape[:1]:
        raise ValueError(f"{folder} has images {images.shape} and labels {labels.shape}, which do not belong together")
    return images, labels


def _content(path):
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is not whole gzip: {error}") from error


def _find(folder, pattern):
    found = sorted([*folder.glob(pattern), *folder.glob(pattern + ".gz")])
    if not found:
        raise FileNotFoundError(f"{folder} has no file {pattern.replace('?', '-')}, with .gz or without")
    return found[0]
