"""Files of somebody else's give a result or one line; `benchmarks/fuzz.py` tries the same for longer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import strangers
from hypothesis import HealthCheck, given, settings

from gae.compute import keep_memory
from gae.errors import FormatError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("target", strangers.TARGETS, ids=lambda target: target.name)
def test_a_file_of_somebody_else_gives_a_result_or_one_line(target, tmp_path):
    with strangers.furnished(target, tmp_path):
        seeds = target.seeds()
        assert strangers.outcome(target, seeds[0]) == "accepted"
        assert {strangers.outcome(target, seed) for seed in seeds} <= {"accepted", "refused"}

        @settings(suppress_health_check=list(HealthCheck))
        @given(target.files())
        def attempt(data):
            assert strangers.outcome(target, data) in ("accepted", "refused")

        attempt()


def refuse(message):
    raise FormatError(message)


def grow():
    assert len(b"x" * (strangers.MEMORY + (50 << 20)))


def loop():
    while True:
        pass


def loop_in_an_except():
    try:
        loop()
    except Exception:
        refuse("stranger: damaged")


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda: None, "accepted"),
        (lambda: refuse("stranger: damaged"), "refused"),
        (lambda: refuse("damaged"), "refused without the file's name"),
        (lambda: 1 / 0, "ZeroDivisionError at test_fuzz.py"),
        (loop, "Slow at test_fuzz.py"),
        (loop_in_an_except, "Slow at test_fuzz.py"),
        (grow, "took "),
        (lambda: Path("new").touch(), "changed"),
        (lambda: Path("../new").touch(), "changed"),
        (lambda: os.unlink("stranger"), "changed"),
        (lambda: Path("out/new").touch(), "accepted"),
    ],
)
def test_what_should_never_happen_is_seen(tmp_path, monkeypatch, read, said):
    monkeypatch.setattr(strangers, "SECONDS", 0.2)
    target = strangers.Target("test", "stranger", lambda path: read(), None, None)
    with strangers.furnished(target, tmp_path):
        assert strangers.outcome(target, b"any bytes").startswith(said)


def test_memory_is_seen_that_the_process_had_from_before(tmp_path):
    keep_memory()
    blocks = [bytearray(16 << 20) for _ in range(2 * strangers.MEMORY >> 24)]
    blocks.clear()
    target = strangers.Target("test", "stranger", lambda path: grow(), None, None)
    with strangers.furnished(target, tmp_path):
        assert strangers.outcome(target, b"any bytes").startswith("took ")


def test_the_long_form_counts_what_it_reads():
    command = [sys.executable, ROOT / "benchmarks" / "fuzz.py", "--seconds", "3", "--only", "file list", "--engine", "hypothesis"]
    done = subprocess.run(command, capture_output=True, text=True)
    tried, accepted, refused, other = (int(cell.replace(",", "")) for cell in re.findall(r"[\d,]+(?= \|)", done.stdout.splitlines()[2]))
    assert done.returncode == 0 and other == 0 and tried == accepted + refused and min(accepted, refused) > 0
