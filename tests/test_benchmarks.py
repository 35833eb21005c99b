"""Benchmarks that call into the stages do so as these are: each in short."""

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture
def benchmark(monkeypatch):
    """Import a benchmark by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    imported = []

    def load(name):
        imported.append(name)
        return importlib.import_module(name)

    yield load
    for name in [*imported, "material"]:
        sys.modules.pop(name, None)


def test_what_an_archive_costs(benchmark, monkeypatch, tmp_path):
    cost = benchmark("cost")
    monkeypatch.setattr(cost, "TRACK", 4)
    seconds, sizes = cost.measure(0, tmp_path)
    assert min(seconds.values()) > 0 and min(sizes.values()) > 0
    assert len(cost.table(seconds, sizes).splitlines()) == 12
