"""Exactly what depends on a change reruns: DVC itself is asked, by a real `dvc repro` for every change."""

import ast
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

AFTER_INDEX = {"preprocess", "train", "convert", "evaluate", "plot"}
AFTER_TRAINING = {"train", "convert", "evaluate", "plot"}

# what is changed in a project that is up to date, and which stages besides `index` must run
CHANGES = {
    "nothing": (lambda project: None, set()),
    "corpus": (lambda project: project.set("corpus.view_transposition", 7), {"corpus"} | AFTER_INDEX),
    "content of audio to train on": (lambda project: project.sing("a", 550), AFTER_INDEX),
    "content of audio to convert": (lambda project: project.sing("b", 550), {"preprocess", "convert", "plot"}),
    "line of the training list": (lambda project: project.append("data/train.txt", "music/c.wav"), AFTER_INDEX),
    "line of the conversion list": (lambda project: project.append("data/convert.txt", "music/c.wav"), {"preprocess", "convert", "plot"}),
    "touch of audio": (lambda project: os.utime(project / "music/a.wav"), set()),
    "cqt": (lambda project: project.set("cqt.hop_length", 320), AFTER_INDEX),
    "model": (lambda project: project.set("model.n_maps", 12), AFTER_TRAINING),
    "train": (lambda project: project.set("train.learning_rate", 0.001), AFTER_TRAINING),
    "convert": (lambda project: project.set("convert.dtype", "float16"), {"convert", "plot"}),
    "evaluate": (lambda project: project.set("evaluate.frames", 15), {"evaluate", "plot"}),
    "plot": (lambda project: project.set("plot.dpi", 50), {"plot"}),
    "how often training is drawn": (lambda project: project.set("plot.interval", 7), set()),
    "compute": (lambda project: project.set("compute.workers", 2), set()),
    "how often training is saved": (lambda project: project.set("compute.checkpoint_seconds", 5), set()),
    "comment in params.yaml": (lambda project: project.append("params.yaml", "# no parameter"), set()),
}


ROOT = Path(__file__).parents[1]
# modules that bring data, settings and errors to where they are wanted, and change no result
CARRIERS = {
    "checkpoints", "commandline", "compute", "errors", "filelists", "files", "hdf5", "index", "locks", "params", "shards", "storage",
}  # fmt: skip


def code_of(stage):
    """The modules that decide what a stage makes: its own, and what these import."""
    modules, beyond = set(), [stage]
    while beyond:
        module = beyond.pop()
        modules.add(module)
        found = [node for node in ast.walk(ast.parse((ROOT / f"gae/{module}.py").read_text())) if isinstance(node, ast.ImportFrom)]
        names = {name for node in found for name in ([a.name for a in node.names] if node.module == "gae" else node.module.split(".")[1:])}
        names = {name for name in names if (ROOT / f"gae/{name}.py").exists()}
        # how training draws is no reason to train again
        beyond += names - modules - CARRIERS - ({"pictures", "view"} if stage == "train" else set())
    return modules


@pytest.mark.parametrize("stage", ["corpus", "index", "preprocess", "train", "convert", "evaluate", "plot"])
def test_a_stage_depends_on_the_code_that_decides_what_it_makes(stage):
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]["deps"]
    assert {f"gae/{module}.py" for module in code_of(stage)} | {f"stages/{stage}.py"} <= set(deps)


class Changed:
    """A copy of a project after one change and one `dvc repro`: the stages that ran and what was printed."""

    def __init__(self, project, change, folder):
        self.project = project.copy(folder / "gae")
        change(self.project)
        self.ran, self.printed = self.project.repro()


@pytest.fixture(scope="module")
def changed(finished_project, tmp_path_factory):
    """A function that waits for the `Changed` of a change: all of them run meanwhile, as many at a time as there are cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = {
            name: pool.submit(Changed, finished_project, change, tmp_path_factory.mktemp("changed"))
            for name, (change, _) in CHANGES.items()
        }
        yield lambda name: futures[name].result()


@pytest.mark.parametrize("name", CHANGES)
def test_what_depends_reruns_and_nothing_else(name, changed):
    assert set(changed(name).ran) == {"index"} | CHANGES[name][1]


def test_one_more_track_costs_the_work_of_one_and_goes_without_trace(changed, finished_project, tmp_path):
    more = changed("line of the conversion list")
    project = more.project.copy(tmp_path / "gae")
    assert set(re.findall(r"frames: 100%.* (\d+/\d+) ", more.printed)) == {"1/1"}
    kept = finished_project / "features/b.h5", project / "features/b.h5"
    assert kept[0].stat().st_mtime_ns == kept[1].stat().st_mtime_ns
    assert set(project.files("features")) == {"b.h5", "c.h5", "index.json"}

    # one by one or all at once: the same bytes
    project.run("python", "stages/preprocess.py", "--out", "afresh", "-S", "compute.staging=staging")
    assert project.files("afresh") == project.files("data/shards")

    (project / "data/convert.txt").write_text("music/b.wav\n")
    ran, printed = project.repro("convert")
    assert ran == ["index", "preprocess", "convert"] and "frames:" not in printed
    for folder in ("data/shards", "features"):
        assert project.files(folder) == finished_project.files(folder)


def test_an_earlier_content_is_noticed_when_it_comes_back(changed, finished_project, tmp_path):
    project = changed("content of audio to train on").project.copy(tmp_path / "gae")
    index = (finished_project / "data/index.json").read_bytes()
    assert (project / "data/index.json").read_bytes() != index
    project.sing("a", 220)
    assert project.repro("index")[0] == ["index"]
    assert (project / "data/index.json").read_bytes() == index


def test_other_weights_take_training_out_of_the_graph(finished_project, tmp_path):
    project = finished_project.copy(tmp_path / "gae")
    shutil.copy(project / "models/gae.safetensors", project / "models/mine.safetensors")
    project.set("convert.weights", "models/mine.safetensors")
    project.set("train.seed", 2)
    assert project.repro("plot")[0] == ["index", "convert", "evaluate", "plot"]


def test_a_path_that_does_not_exist_stops_the_run_before_any_work(fresh_project, tmp_path):
    project = fresh_project.copy(tmp_path / "gae")
    project.append("data/train.txt", "music/none.wav")
    printed = project.run("dvc", "repro", fails=True)
    assert "data/train.txt, line 3: no such file: music/none.wav" in printed and "Traceback" not in printed
    assert not (project / "data/corpus").exists()


def test_git_sees_only_what_belongs_to_it(finished_project):
    tracked = set(finished_project.run("git", "ls-files").split())
    assert {"dvc.lock", "metrics.json", "models/metrics.json"} <= tracked
    assert not any(name.startswith(("data/corpus", "data/shards", "data/index", "features", "plots")) for name in tracked)
    assert "models/gae.safetensors" not in tracked
