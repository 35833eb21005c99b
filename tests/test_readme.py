"""The README's Python, run as it stands."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny

import gae

README = Path(__file__).parents[1] / "README.md"
RATE = 22050


def test_the_examples_run_and_find_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pitches = np.random.default_rng(1).integers(0, 24, 32)
    samples = melody(pitches)
    soundfile.write("song.flac", samples, RATE)
    gae.extract(samples, RATE).save("score.h5")
    gae.extract(samples[RATE // 2 :], RATE).save("performance.h5")  # begins half a second later
    played = melody([*pitches, *pitches[:16] + 5])  # its first 4 s return after 8, in another key
    gae.extract(np.pad(played, 4 * RATE), RATE).save("sonata.h5")
    (tmp_path / "features").mkdir()
    for name, start, stop in (("performance", 2, None), ("other", 20, None), ("short", 0, 2)):
        gae.extract(samples[start * RATE // 4 : stop and stop * RATE // 4], RATE).save(f"features/{name}.h5")

    basics, aligning, finding, repeating, chain = re.findall(r"```python\n(.+?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    run(basics, names)
    assert names["features"].values.shape[1] == int(re.search(r"\(n_frames, (\d+)\)", basics)[1])
    assert run(aligning, names) == pytest.approx([0.5, 2.0], abs=0.05)
    (_, best, time), *others = run(finding, names)
    assert (best, time) == ("performance", pytest.approx(50 * names["hop"] - 0.5, abs=0.03)) and [name for _, name, _ in others] == [
        "other"
    ]
    (_, first, again), *_ = found = run(repeating, names)
    assert again - first == pytest.approx(8, abs=0.1) and 4 <= first < 8 and found == sorted(found, reverse=True)
    run(chain, names)
    assert names["values"].shape == names["features"].values.shape


def melody(pitches):
    return np.concatenate([tiny.tone(0.25, RATE, 220 * 2 ** (pitch / 12)) for pitch in pitches])


def run(source, names):
    """Execute Python; the value of its last line, where that is an expression."""
    *statements, last = ast.parse(source).body
    exec(compile(ast.Module(statements, []), "README.md", "exec"), names)
    if not isinstance(last, ast.Expr):
        return exec(compile(ast.Module([last], []), "README.md", "exec"), names)
    return eval(compile(ast.Expression(last.value), "README.md", "eval"), names)
