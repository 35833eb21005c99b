"""A tiny project of git and DVC, driven by command lines alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import soundfile
import tiny
import yaml

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["corpus", "index", "preprocess", "train", "convert", "evaluate", "plot"]

# Pieces of this seed are short and quickly read. What is not named keeps the value that the checkout has.
TINY = {
    "corpus": {"hours": 0.005, "views": 2, "view_transposition": 2, "heldout": 2, "seed": 319},
    "data": {"shard_mb": 1},
    "cqt": {"sample_rate": 8000, "hop_length": 256, "fmin": 110.0, "n_bins": 48, "bins_per_octave": 12},
    "model": {"n_factors": 16, "n_hidden": 8, "n_maps": 8, "context": 3, "dilation": 2},
    "train": {"steps": 50, "batch": 2, "block": 32, "shift": 12, "contrast_frames": 32},
    "evaluate": {"frames": 20, "stack": 4, "bootstrap": 20},
    "plot": {"seconds": 2, "filters": 4, "dpi": 40},
    "compute": {"workers": 1},
}


class Project:
    """A checkout with a git repository of its own. What lies beside it is its own too.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def __truediv__(self, path):
        return self.folder / path

    @property
    def environment(self):
        """This interpreter's programs first, nobody's configuration, and DVC's own notes beside the project."""
        notes = {f"DVC_{place}_DIR": str(self.folder.parent / "dvc") for place in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG")}
        names = {f"GIT_{who}_{what}": "tests@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        fixed = {"PATH": path, "GIT_CONFIG_GLOBAL": os.devnull, "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"}
        return os.environ | notes | names | fixed

    def run(self, *command, fails=False):
        """Run a command in the project; its standard output and error as one text."""
        done = subprocess.run(command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        printed = done.stdout.replace("\r", "\n")
        assert bool(done.returncode) == fails, f"{command} ended with {done.returncode}:\n{printed}"
        return printed

    def repro(self, *arguments):
        """`dvc repro`: the stages that ran, in order, and all that was printed."""
        printed = self.run("dvc", "repro", *arguments)
        return stages_that_ran(printed), printed

    def commit(self):
        """Commit all that git does not ignore."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "A state")

    def set(self, key, value):
        """Replace one parameter."""
        section, name = key.split(".")
        values = yaml.safe_load((self / "params.yaml").read_text())
        values[section][name] = value
        (self / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def sing(self, name, frequency):
        """Record music/<name>.wav: two seconds of a tone."""
        (self / "music").mkdir(exist_ok=True)
        soundfile.write(self / "music" / f"{name}.wav", tiny.tone(2, 8000, frequency), 8000)

    def append(self, path, line):
        """Write one more line into a file."""
        with open(self / path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def copy(self, folder):
        """The same project, times of files included, somewhere else."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder)

    def clone(self, folder):
        """A fresh clone: what git tracks, and nothing that DVC keeps."""
        self.run("git", "clone", "--quiet", str(self.folder), str(folder))
        return Project(folder)

    def files(self, path):
        """What is in the files below a folder, by name."""
        return tiny.content(self / path)


def stages_that_ran(printed):
    """The stages that DVC ran, in order; a result out of its cache would be no run, and must not occur."""
    assert "is cached" not in printed
    return re.findall(r"^Running stage '(\w+)'", printed, re.MULTILINE)


def fresh(folder):
    """A project with the files of this checkout, tiny parameters and lists; nothing has run yet."""
    project = Project(folder)
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    for name in names:
        if not name.startswith(("tests/", "benchmarks/", "docs/")) and name != "dvc.lock" and (ROOT / name).is_file():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, project / name)
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values = {section: {**keys, **TINY.get(section, {})} for section, keys in values.items()}
    (project / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    for name, frequency in {"a": 220, "b": 330, "c": 440}.items():
        project.sing(name, frequency)
    (project / "data/train.txt").write_text("data/corpus/train/*/1.flac\tdata/corpus/train/*/2.flac\nmusic/a.wav\n")
    (project / "data/convert.txt").write_text("music/b.wav\n")
    project.run("git", "init", "--quiet", "--initial-branch", "main")
    project.commit()
    return project
