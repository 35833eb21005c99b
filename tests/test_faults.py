"""The faults of mishaps.py that take little time, once each; benchmarks/faults.py has all happen often, to the whole pipeline."""

import os
import random
from pathlib import Path

import mishaps
import pytest

FAULTS = ["stage killed", "worker process killed", "DVC killed", "disk full", "audio changes while it is read"]
FAULTS += ["shard truncated", "index of shards truncated", "feature file truncated"]
random.Random(1).shuffle(FAULTS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return mishaps.World(tmp_path_factory.mktemp("world"), workers=1)


@pytest.mark.parametrize("name", FAULTS)
def test_it_ends_in_the_same_bytes_or_says_what_to_do(world, tmp_path, name):
    mishaps.happen(name, world, tmp_path / "round", seed=1)  # raises an error otherwise


# What finds nothing must be able to find something

OUTPUTS = [path for stage in mishaps.PIPELINE for path in mishaps.outputs(stage) if Path(path).suffix]


@pytest.mark.parametrize("path", OUTPUTS)
def test_half_of_any_output_is_found(tmp_path, path):
    file = tmp_path / Path(path).name
    file.write_bytes(b"half")
    with pytest.raises(Exception) as caught:  # of what reads it
        mishaps.validate(file)
    assert "no output" not in str(caught.value)


@pytest.fixture
def around(world, tmp_path):
    around = mishaps.Round(world, tmp_path / "round", seed=1)
    around.prepare()
    return around


def test_half_a_file_is_found(around):
    around.check()
    file = around.project / "features/e.h5"
    os.truncate(file, file.stat().st_size // 2)
    around.check(file)
    with pytest.raises(mishaps.Broken, match=r"features/e\.h5: FormatError"):
        around.check()


def test_another_byte_and_a_file_that_should_not_be_there_are_found(around):
    around.compare()
    around.project.append("data/shards/train/index.json", " ")
    (around.project / "features/.e.h5.1.partial").touch()
    with pytest.raises(mishaps.Broken, match=r"data/shards/train/index\.json.*features/\.e\.h5\.1\.partial|partial.*index"):
        around.compare()


@pytest.mark.parametrize("program", ["raise RuntimeError('two\\nlines')", "import sys; sys.exit('stage.py: error: this\\nand that')"])
def test_more_than_one_line_is_found(around, program):
    (around.project / "stage.py").write_text(program)
    run = around.start([str(around.project / "stage.py")])
    assert not run.ended()
    with pytest.raises(mishaps.Broken, match="ended with 1"):
        run.message  # noqa: B018
