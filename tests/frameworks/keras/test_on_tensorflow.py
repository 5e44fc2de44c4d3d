"""Keras on its tensorflow backend; a file of its own for each, since workers of the tests share files among them."""

from running import run_suites


def test_suites(tmp_path):
    """Every suite of this folder passes."""
    run_suites("tensorflow", tmp_path)
