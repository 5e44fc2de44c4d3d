"""Times `fit` of a CNN in Keras, watched and unwatched, on the backend of KERAS_BACKEND; prints what it found as JSON.

Copies of one model live in one process. A round runs each of them through one epoch of a few batches, in an order drawn
anew, so that whatever slows the machine for seconds slows all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# XLA on the CPU maps and unmaps large temporaries, which makes its times differ from one process to the next.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "200000000",
}

BATCH, BATCHES = 64, 4
EARLY = 24


def build() -> Any:
    """A CNN of 5.3 million parameters for 32 x 32 images."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(128, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(630, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def main() -> None:
    """Time rounds for so many seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    args = parser.parse_args()
    import keras
    import numpy as np

    import isograd

    draw = np.random.default_rng(0)
    x = draw.normal(size=(BATCH * BATCHES, 32, 32, 3)).astype("float32")
    y = draw.integers(0, 10, BATCH * BATCHES)
    kept: dict[str, Any] = {"unwatched": build(), "unwatched again": build()}
    watched = {"isograd, default": None, "isograd, guard: skip": isograd.Guard(skip=True)}
    times: dict[str, list[float]] = {}
    compiled: dict[str, float] = {}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for name, guard in watched.items():
            kept[name] = build()
            stack.enter_context(isograd.watch(kept[name], out=Path(folder) / name.replace(" ", "-"), guard=guard))

        def run(name: str) -> float:
            start = time.perf_counter()
            kept[name].fit(x, y, batch_size=BATCH, verbose=0, shuffle=False)
            return (time.perf_counter() - start) / BATCHES

        for name in kept:
            # Behind the steps that are all read, and behind every compilation.
            first = [run(name) for _ in range(1 + (EARLY // BATCHES if name in watched else 1))]
            compiled[name] = BATCHES * (first[0] - min(first))
            times[name] = []
        order, end = random.Random(0), time.perf_counter() + args.seconds
        while time.perf_counter() < end or len(times["unwatched"]) < 8:
            for name in order.sample(list(kept), len(kept)):
                times[name].append(run(name))
        parameters = kept["unwatched"].count_params()
    found = {
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
        "parameters": parameters,
        "compile_seconds": compiled,
        "times": times,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    if not os.environ.get("MALLOC_TOP_PAD_"):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    main()
