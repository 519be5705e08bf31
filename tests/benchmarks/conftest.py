"""What tests of several benchmarks set up."""

import pytest

from benchmarks import limits


@pytest.fixture(autouse=True)
def limits_by_one_run(monkeypatch):
    """Not by the best of five: nobody reads these."""
    monkeypatch.setattr(limits, "_REPEATS", 1)
