"""Imported where programs are forked from: what torch imports when a program makes its first optimizer."""

import torch._dynamo  # noqa: F401
