"""What every program of this folder has in common: its command line, and the line with which it ends."""

import argparse


def arguments(description, *, pair=True):
    """`--seed`, and for a pair `--fixed`: the same program with the fix that its thread accepted."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    if pair:
        parser.add_argument("--fixed", action="store_true", help="with the accepted fix")
    return parser.parse_args()


def verdict(holds, *, word="repaired", **figures):
    """Print `repaired: yes (loss 0.0026, accuracy 1)`, or `no`; controls say `healthy`."""
    shown = ", ".join(f"{name} {_shown(value)}" for name, value in figures.items())
    print(f"{word}: {'yes' if holds else 'no'} ({shown})")


def _shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
