"""The examples are what a newcomer runs first: they run, they learn, and isograd has nothing to say against them."""

import gzip
import importlib.util
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from sklearn.datasets import load_digits

EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAMS = ["linear_regression", "two_layer_network", "mlp_digits", "cnn_digits", "lstm", "gpt"]
STEPS = 100


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


idx = load("idx")


def run(*arguments, cwd):
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300)
    return done.returncode, done.stdout, done.stderr


def losses(output):
    return [float(loss) for loss in re.findall(r"^step +\d+  loss (\S+)", output, re.MULTILINE)]


# ---- the IDX format -----------------------------------------------------------------------------------------------

# The numbers of the format's description and `struct`'s letters for them: written from the page, not from the reader.
KINDS = {"uint8": (0x08, "B"), "int8": (0x09, "b"), "int16": (0x0B, "h"), "int32": (0x0C, "i"), "float32": (0x0D, "f"),
         "float64": (0x0E, "d")}  # fmt: skip
ARRAYS = st.sampled_from(sorted(KINDS)).flatmap(
    lambda kind: arrays(kind, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


def encode(array):
    """The bytes of `array` as IDX, one entry after the other."""
    code, letter = KINDS[array.dtype.name]
    header = bytes([0, 0, code, array.ndim]) + b"".join(struct.pack(">I", length) for length in array.shape)
    return header + b"".join(struct.pack(">" + letter, entry) for entry in array.ravel().tolist())


@given(array=ARRAYS)
def test_idx_round_trip(array):
    """Any array of any of the six number types, axes of length zero included, is read as it was written."""
    read = idx.parse(encode(array))

    assert (array.dtype, array.shape) == (read.dtype, read.shape)
    np.testing.assert_array_equal(array, read)


@given(array=ARRAYS, data=st.data())
def test_idx_cut_off_anywhere(array, data):
    """A file that lacks any number of its last bytes is refused in one sentence that names it."""
    content = encode(array)
    kept = data.draw(st.integers(0, len(content) - 1))

    with pytest.raises(ValueError, match=r"^digits\.idx [^\n]+$"):
        idx.parse(content[:kept], "digits.idx")


@given(array=ARRAYS, more=st.binary(min_size=1, max_size=9))
def test_idx_too_long(array, more):
    """Bytes behind the last entry are refused: the header and the content contradict each other."""
    with pytest.raises(ValueError, match="is too long"):
        idx.parse(encode(array) + more)


@given(content=st.binary(max_size=40) | st.binary(max_size=20).map(lambda tail: b"\0\0" + tail))
def test_idx_any_bytes(content):
    """Bytes of any kind give an array whose re-encoding they are, or a ValueError, and nothing else."""
    try:
        array = idx.parse(content)
    except ValueError:
        return
    assert encode(array) == content or np.isnan(array.astype("float64")).any()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "starts with nothing"),
        (b"\x89PNG\r\n", "starts with 89 50 4e 47, not 00 00"),
        (
            b"\0\0\x0a\1\0\0\0\0",
            "number type 0x0A, which IDX does not define; it knows 0x08, 0x09, 0x0B, 0x0C, 0x0D, 0x0E",
        ),
        (b"\0\0\x08\3\0\0\0\2", "cut off in its header: 8 bytes of 16"),
        (b"\0\0\x08\1\0\0\0\2\7", r"cut off: 9 bytes, but its header \(2,\) asks for 10"),
        (b"\0\0\x0e\3" + b"\xff" * 12, "is cut off: 16 bytes"),
        (b"\x1f\x8b\x08\0broken", "is not whole gzip"),
        (gzip.compress(b"\0\0\x08\1\0\0\0\2\7\7")[:-9], "is not whole gzip"),
        (gzip.compress(b"\0\0\x08\1\0\0\0\2\7"), "cut off: 9 bytes"),
    ],
    ids=["empty", "magic", "number-type", "header", "entries", "huge", "not-gzip", "gzip-cut-off", "cut-off-in-gzip"],
)
def test_idx_broken_file(tmp_path, content, message):
    """A broken file is refused with its name, what is wrong and the numbers."""
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)

    with pytest.raises(ValueError, match=message) as raised:
        idx.read(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def write_mnist(folder, *, dot=False, compressed=False, num=400):
    """scikit-learn's digits, enlarged to 28 x 28, in the two files that MNIST is published as."""
    images, labels = load_digits(return_X_y=True)
    images = np.pad(np.kron(images[:num].reshape(-1, 8, 8), np.ones((3, 3))), ((0, 0), (2, 2), (2, 2)))
    written = (images * 15.9375).astype("uint8"), labels[:num].astype("uint8")
    folder.mkdir(exist_ok=True)
    for name, array in zip(("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), written, strict=True):
        content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        path = folder / (name.replace("-idx", ".idx") if dot else name)
        path = path.with_name(path.name + ".gz") if compressed else path
        path.write_bytes(gzip.compress(content, 1) if compressed else content)
    return written


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("dot", [False, True], ids=["dash", "dot"])
def test_mnist_under_its_published_names(tmp_path, dot, compressed):
    """Images and labels are found and read under both spellings that MNIST circulates with, gzip or not."""
    images, labels = write_mnist(tmp_path, dot=dot, compressed=compressed, num=20)

    read = idx.read_mnist(tmp_path, "train")

    np.testing.assert_array_equal(images, read[0])
    np.testing.assert_array_equal(labels, read[1])


def test_mnist_that_does_not_belong_together(tmp_path):
    """As many labels as images are required."""
    write_mnist(tmp_path, num=20)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(encode(np.zeros(19, "uint8")))

    with pytest.raises(ValueError, match=r"images \(20, 28, 28\) and labels \(19,\)"):
        idx.read_mnist(tmp_path, "train")


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
def test_digits_program_learns_from_mnist_files(tmp_path, compressed):
    """The program for scikit-learn's digits learns as well from a folder in MNIST's own format."""
    write_mnist(tmp_path / "mnist", compressed=compressed)

    status, output, errors = run(EXAMPLES / "mlp_digits.py", "--data", "mnist", "--steps", STEPS, cwd=tmp_path)

    assert (0, "") == (status, errors)
    assert losses(output)[-1] < 0.2 * losses(output)[0]


@pytest.mark.parametrize("broken", [False, True], ids=["no-files", "broken-file"])
def test_digits_program_refuses_a_bad_folder(tmp_path, broken):
    """A folder without MNIST's files, or with a broken one, ends in one sentence and status 2, not in a traceback."""
    if broken:
        write_mnist(tmp_path, num=20)
        (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\3")

    status, output, errors = run(EXAMPLES / "mlp_digits.py", "--data", tmp_path, cwd=tmp_path)

    assert (2, "") == (status, output)
    assert str(tmp_path) in errors.splitlines()[-1]
    assert "Traceback" not in errors


# ---- the programs -------------------------------------------------------------------------------------------------

DIGEST = """
import hashlib, random, runpy, sys
import numpy, torch

kept, construct = [], torch.optim.Optimizer.__init__

def keep(self, *arguments, **keywords):
    construct(self, *arguments, **keywords)
    kept.append(self)

def entries(value):
    if isinstance(value, dict):
        for key in value:
            yield from entries(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from entries(item)
    else:
        yield value.detach().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()

torch.optim.Optimizer.__init__ = keep
random.seed(0)
numpy.random.seed(0)
sys.argv = sys.argv[1:]
sys.path[0] = {folder!r}
runpy.run_path(sys.argv[0], run_name="__main__")
seen = hashlib.sha256()
for optimizer in kept:
    for part in entries([[group["params"] for group in optimizer.param_groups], optimizer.state_dict()]):
        seen.update(part)
for part in entries([torch.get_rng_state(), random.getstate(), list(numpy.random.get_state())]):
    seen.update(part)
print(len(kept), seen.hexdigest())
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Exit status, output and errors of each program, run by Python."""
    folder = tmp_path_factory.mktemp("plain")
    return {name: run(EXAMPLES / f"{name}.py", "--steps", STEPS, cwd=folder) for name in PROGRAMS}


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The same of each program run by `isograd run`, and the folder that isograd wrote."""
    folder = tmp_path_factory.mktemp("watched")
    return {
        name: (*run(*isograd_run(folder / name), EXAMPLES / f"{name}.py", "--steps", STEPS, cwd=folder), folder / name)
        for name in PROGRAMS
    }


def isograd_run(folder):
    return "-m", "isograd", "run", "--out", folder


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_learns(plain, name):
    """Each example ends well, says nothing on stderr, and its loss falls."""
    status, output, errors = plain[name]

    assert (0, "") == (status, errors)
    assert losses(output)[-1] < 0.6 * losses(output)[0]


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_is_plain(name):
    """Each example is under 60 lines and knows nothing of isograd."""
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")

    assert text.count("\n") < 60
    assert "isograd" not in text


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_takes_its_seed(plain, tmp_path, name):
    """Another seed gives another run: the seed is what the program's randomness comes from."""
    status, output, _ = run(EXAMPLES / f"{name}.py", "--steps", 1, "--seed", 1, cwd=tmp_path)

    assert status == 0
    assert losses(plain[name][1])[0] != losses(output)[0]


ELSEWHERE = {
    "gradient_clipping",
    "linear_regression_tensorflow",
    "mlp_digits_keras",
    "mlp_digits_optax",
    "sick_network",
}
"""Those of `test_examples_frameworks.py`."""


def test_every_program_is_listed():
    """No file in `examples` escapes these tests."""
    assert {*PROGRAMS, *ELSEWHERE, "idx"} == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", PROGRAMS)
def test_watched_program_says_the_same(plain, watched, name):
    """Under `isograd run`, each example has the same exit status and the same bytes on stdout."""
    assert plain[name][:2] == watched[name][:2]


@pytest.mark.parametrize("name", PROGRAMS)
def test_watched_program_is_healthy(watched, tmp_path, name):
    """`isograd diagnose` finds no cause in any example and saw every step of it."""
    (found,) = [path for path in watched[name][-1].iterdir() if path.is_dir()]

    status, output, errors = run("-m", "isograd", "diagnose", found, "--json", cwd=tmp_path)
    diagnosis = json.loads(output)

    assert (0, []) == (status, diagnosis["causes"]), errors
    assert (True, STEPS) == (diagnosis["healthy"], diagnosis["steps"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_watched_program_ends_in_the_same_bits(tmp_path, name):
    """Weights, optimizer state and all three random generators end the same, bit for bit, watched and not."""
    digest = tmp_path / "digest.py"
    digest.write_text(DIGEST.format(folder=str(EXAMPLES)), encoding="utf-8")
    arguments = [digest, EXAMPLES / f"{name}.py", "--steps", 30]

    plain = run(*arguments, cwd=tmp_path)
    watched = run(*isograd_run(tmp_path / "runs"), *arguments, cwd=tmp_path)

    assert plain[:2] == watched[:2]
    assert re.search(r"^1 [0-9a-f]{64}$", plain[1], re.MULTILINE), plain[2]
