"""Benchmarks that call into the stages do so as these are: in short."""

from pathlib import Path


def test_what_an_archive_costs(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import cost

    monkeypatch.setattr(cost, "TRACK", 4)
    seconds, sizes = cost.measure(0, tmp_path)
    assert min(seconds.values()) > 0 and min(sizes.values()) > 0
    assert len(cost.table(seconds, sizes).splitlines()) == 12
