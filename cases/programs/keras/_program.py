"""What every program of this folder has in common: the command line and the last line of the PyTorch programs."""

import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from _command import arguments, verdict  # it lies in the folder above

__all__ = ["all_finite", "arguments", "verdict"]


def all_finite(history, model):
    """Whether every epoch's loss and every weight is finite (on TensorFlow some kernels hide NaN from the loss)."""
    return bool(np.isfinite(history.history["loss"]).all() and all(np.isfinite(w).all() for w in model.get_weights()))
