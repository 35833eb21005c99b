"""What the world does to a running pipeline, done to a tiny one on purpose, and what must hold afterwards.

A round starts stages, or DVC, in a copy of a project, does one thing to them, and then runs the same command again. Every file
that then stands under its final name must be whole, and the command must end in the bytes of a run that nobody disturbed, or
say in one line what to do; that is then done.
"""

import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path

import psutil
import soundfile
import tiny
import yaml
from PIL import Image
from project import ROOT, Project, fresh
from project import STAGES as PIPELINE

from gae import audio, features, shards
from gae.files import read_json
from gae.modelfile import load_model

STAGES = ["index", "preprocess", "train", "convert"]  # what a world without the built-in corpus can run
SAME, SAID = "ended in the same bytes", "said in one line what to do"
_PARALLEL = ("corpus", "index", "preprocess", "convert", "evaluate", "plot")  # stages with worker processes
_PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
_OWN = {"index": ["data/.index-memory.json"], "preprocess": ["data/.staging"], "train": ["models/.checkpoints"]}  # kept from DVC
_SPEEDS = re.compile(rb'"(frames_per_second|times_real_time|conversion_times_real_time)": [\d.e+]+|[\d.]+ times real time')
_PATIENCE = 300  # s after which a process hangs
_TRACKS = {"a": 220, "b": 330, "c": 440, "d": 550, "e": 660, "f": 770, "g": 880}


class Broken(Exception):
    """What must not happen after a mishap."""


class Impossible(Exception):
    """A mishap that can't be staged on this machine."""


class World:
    """A tiny project that ran undisturbed.

    Parameters
    ----------
    folder : Path
    stages : sequence of str
        Those that run, in their order.
    workers : int
        Processes of the stages that have such.

    Attributes
    ----------
    finished : Project
    seconds : dict of str to float
        How long each stage took.
    """

    def __init__(self, folder, stages=STAGES, workers=2):
        self.folder, self.stages, self.workers, self.seconds = Path(folder), stages, workers, {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["gae.train", "gae.preprocess", "gae.index", "gae.convert", "gae.evaluate"])
        self.finished = self._begin(self.folder / "finished" / "gae")
        for stage in stages:
            began = time.monotonic()
            self.start(self.finished, f"stages/{stage}.py").succeed()
            self.seconds[stage] = time.monotonic() - began
        if stages == PIPELINE:
            self.finished.run("dvc", "commit", "--force")
            shutil.rmtree(self.finished / ".dvc/cache/runs")

    @cached_property
    def other(self):
        """The same with other audio in one file to train on and one to convert; the model stays."""
        other = self.finished.copy(self.folder / "other" / "gae")
        for name in "ae":
            _sing(other, name, 1.5 * _TRACKS[name])
        for stage in ("index", "preprocess", "convert"):
            self.start(other, f"stages/{stage}.py").succeed()
        return other

    def _begin(self, folder):
        project = fresh(folder)
        settings = {"data.dtype": "float32", "cqt.hop_length": 128, "train.steps": 75, "compute.checkpoint_seconds": 0}
        settings["compute.workers"] = self.workers
        for key, value in settings.items():
            project.set(key, value)
        for name, frequency in _TRACKS.items():
            _sing(project, name, frequency)
        rendered = "data/corpus/train/*/1.flac\tdata/corpus/train/*/2.flac\n" if "corpus" in self.stages else ""
        (project / "data/train.txt").write_text(rendered + "music/a.wav\tmusic/b.wav\nmusic/c.wav\nmusic/d.wav\nmusic/g.wav\n")
        (project / "data/convert.txt").write_text("music/e.wav\nmusic/f.wav\nmusic/c.wav\n")
        return project

    def start(self, project, *command, limit=None):
        """Start a stage, ``stages/<name>.py``, in a process that has all it imports; or DVC."""
        said = project.folder.parent / f"said-{time.monotonic_ns()}"
        said.touch()
        process = self._context.Process(target=_run, args=(project, command, said, limit))
        process.start()
        return Run(process, said, command)


def _run(project, command, said, limit):
    """The body of a process in which a command runs."""
    os.setsid()
    os.chdir(project.folder)
    with open(said, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if command[0] == "dvc":
        os.execvpe("dvc", command, project.environment)
    script = ROOT / command[0]
    sys.argv, sys.path[:1] = [str(script), *command[1:]], [str(script.parent)]
    runpy.run_path(str(script), run_name="__main__")


class Run:
    """A command under way, in a session of its own."""

    def __init__(self, process, said, command):
        self.process, self.said, self.command = process, said, command

    def succeed(self):
        """Wait for a run that must end well."""
        if not self.ended():
            raise Broken(f"{' '.join(self.command)} failed:\n{self.text}")

    def ended(self):
        """Wait for the end; whether it was a good one."""
        self.process.join(_PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            raise Broken(f"{' '.join(self.command)} hangs:\n{self.text}")
        return self.process.exitcode == 0

    @property
    def text(self):
        """What was printed, as a terminal shows it at last."""
        lines = self.said.read_text(errors="replace").split("\n")
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)

    @property
    def message(self):
        """The one line that a run that failed ends in."""
        lines = [line for line in self.text.splitlines() if line.strip() and not re.match(r"warning: |[\w: -]+: +\d+%\|", line)]
        if self.command[0] == "dvc":
            lines = [line for line in lines if re.match(r"\w+\.py: error: |ERROR: ", line)][:1]
        if "Traceback" in self.text or len(lines) != 1 or not re.match(r"\w+\.py: error: |ERROR: ", lines[0]):
            raise Broken(f"{' '.join(self.command)} ended with {self.process.exitcode}:\n{self.text}")
        return lines[0]

    def members(self):
        """All processes of the session that still run."""
        return [process for process in psutil.process_iter() if _session(process.pid) == self.process.pid and _alive(process)]

    def workers(self):
        """The worker processes."""
        return [process for process in self.members() if any("spawn_main" in word for word in _words(process))]

    def quiet(self):
        """Wait until no process of the session runs."""
        deadline = time.monotonic() + _PATIENCE
        while left := self.members():
            if time.monotonic() > deadline:
                raise Broken(f"{' '.join(self.command)} leaves processes: {[_words(process) for process in left]}")
            time.sleep(0.05)


def _session(pid):
    with suppress(OSError):
        return os.getsid(pid)


def _alive(process):
    with suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE


def _words(process):
    with suppress(psutil.Error):
        return process.cmdline()
    return []


class Round:
    """One mishap in a copy of the finished project, at moments and places that a seed draws.

    Parameters
    ----------
    world : World
    folder : Path
        Does not exist yet.
    seed : int
    """

    def __init__(self, world, folder, seed):
        self.world, self.folder = world, Path(folder)
        self.rng = random.Random(seed)
        self.project, self.runs = Project(self.folder / "gae"), []
        self.goal = world.finished

    def prepare(self, *stages, stale=None):
        """Copy the project to the moment before some stages run: nothing is there of them, or what other audio gave."""
        shutil.copytree(self.world.finished.folder, self.project.folder, symlinks=True, dirs_exist_ok=True)
        stale = self.rng.random() < 0.5 if stale is None else stale
        for path in [path for stage in stages for path in outputs(stage) + _OWN.get(stage, [])]:
            _remove(self.project / path)
            if stale and stages[0] != "corpus":
                _copy(self.world.other / path, self.project / path)
        for stage in stages:
            self._forget(stage)

    def _forget(self, stage):
        """Take what a stage gave out of DVC's cache, from which it would be taken instead of running the stage."""
        lock = self.project / "dvc.lock"
        for out in yaml.safe_load(lock.read_text())["stages"][stage]["outs"] if lock.exists() else []:
            (self.project / ".dvc/cache/files/md5" / out["md5"][:2] / out["md5"][2:]).unlink(missing_ok=True)

    def stage(self, among=None):
        """Draw a stage."""
        return self.rng.choice([stage for stage in among or self.world.stages if stage in self.world.stages])

    def repro(self, stage):
        """`dvc repro`, of one stage alone where the world is not the whole pipeline."""
        return ["dvc", "repro"] if self.world.stages == PIPELINE else ["dvc", "repro", "--single-item", stage]

    def start(self, command, **options):
        """Start a command in the copy."""
        self.runs.append(self.world.start(self.project, *command, **options))
        return self.runs[-1]

    def wait(self, seconds):
        """Wait up to some seconds, a random while."""
        time.sleep(self.rng.uniform(0, seconds))

    def settle(self, *commands):
        """Run the commands again, doing what they ask for; what came of it."""
        verdict = SAME
        for _ in range(4):
            failed = next((run for command in commands if not (run := self.start(command)).ended()), None)
            if failed is None:
                break
            verdict = SAID
            self.heed(failed.message)
        else:
            raise Broken(f"does not come to an end: {failed.text}")
        self.calm()
        self.compare()
        return verdict

    def heed(self, message):
        """Do what a message asks for."""
        named = re.sub(r"^\w+\.py: error: ", "", message).partition(": ")[0]
        if "delete it" in message:
            _remove(self.project / named)
        if "another run" in message or message.startswith("ERROR: "):
            self.calm()
        elif stage := re.search(r"dvc repro (\w+)", message):
            self.start([f"stages/{stage[1]}.py"]).succeed()
        elif "dvc repro" in message or "convert the audio again" in message:
            self.start([f"stages/{_maker(named)}.py"]).succeed()
        elif not re.search(r"run (it )?again", message):
            raise Broken(f"no remedy: {message}")

    def calm(self):
        """Wait until nothing runs any more."""
        for run in self.runs:
            run.quiet()

    def check(self, *damaged):
        """Make sure that every output under its final name is whole, but for those that the mishap itself damaged."""
        for file in _files(self.project.folder):
            if _is_output(file.relative_to(self.project.folder)) and file not in damaged:
                try:
                    validate(file)
                except FileNotFoundError:  # a run that goes on may replace it
                    continue
                except Exception as error:
                    raise Broken(f"{file.relative_to(self.project.folder)}: {type(error).__name__}: {error}") from error

    def compare(self):
        """Make sure that all files are those of the undisturbed project."""
        mine, theirs = _content(self.project), _content(self.goal)
        if mine != theirs:
            differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            raise Broken(f"differ: {[(name, name in mine, name in theirs) for name in differing]}")


# ---- the mishaps: each takes a round, and says what came of it


def killed_stage(around):
    """SIGKILL of a stage."""
    stage = around.stage()
    around.prepare(stage)
    run = around.start([f"stages/{stage}.py"])
    around.wait(around.world.seconds[stage])
    run.process.kill()
    run.ended()
    around.check()
    return around.settle([f"stages/{stage}.py"])


def killed_worker(around):
    """SIGKILL of a worker process."""
    stage = around.stage(_PARALLEL)
    around.prepare(stage, stale=False)
    run = around.start([f"stages/{stage}.py"])
    while run.process.is_alive() and not run.workers():
        time.sleep(0.01)
    around.wait(around.world.seconds[stage])
    with suppress(IndexError, psutil.NoSuchProcess):
        around.rng.choice(run.workers()).kill()
    if not run.ended() and "run again" not in run.message:
        raise Broken(run.text)
    around.check()
    return around.settle([f"stages/{stage}.py"])


def killed_dvc(around):
    """SIGKILL of `dvc repro` while a stage runs."""
    stage = around.stage()
    around.prepare(stage)
    command = around.repro(stage)
    run = around.start(command)
    while run.process.is_alive() and f"Running stage '{stage}'" not in run.text:
        time.sleep(0.02)
    around.wait(2 + around.world.seconds[stage])  # nothing is imported beforehand here
    run.process.kill()
    run.ended()
    around.check()
    if around.rng.random() < 0.5:
        run.quiet()  # the stage outlives its DVC
    return around.settle(command)


def two_at_once(around):
    """`dvc repro` twice at once."""
    stage = around.stage()
    around.prepare(stage)
    command = around.repro(stage)
    first = around.start(command)
    around.wait(2 + around.world.seconds[stage])
    second = around.start(command)
    for run in (first, second):
        if not run.ended():
            assert run.message
    around.check()
    return around.settle(command)


def full_disk(around):
    """A disk that is full, until room is made."""
    stage = around.stage()
    with _small_disk(around.project.folder) as resize:
        around.prepare(stage, stale=False)
        needed = sum(_size(around.world.finished / path) for path in outputs(stage))
        left = round(around.rng.uniform(0, 1.2 * needed))
        limit = resize(left)
        command = [f"stages/{stage}.py"]
        failed = not (run := around.start(command, limit=limit)).ended()
        if failed and "make room" not in run.message:
            raise Broken(run.text)
        around.calm()
        around.check()
        resize(None)
        verdict = around.settle(command)
        return SAID if failed else verdict


def read_only(around):
    """An output folder that is read-only, until it no longer is."""
    stage = around.stage()
    around.prepare(stage, stale=False)
    place = around.project / around.rng.choice(outputs(stage))
    folder = place.parent if place.suffix else place
    folder.mkdir(parents=True, exist_ok=True)
    command = [f"stages/{stage}.py"]
    with _write_protected(folder):
        run = around.start(command)
        if run.ended():
            raise Broken(f"wrote into a read-only folder, or missed it: {folder}")
        if "permissions" not in run.message:
            raise Broken(run.text)
        around.calm()
        around.check()
    around.settle(command)
    return SAID


def changing_audio(around):
    """Audio that changes while it is read."""
    around.prepare("index", "preprocess")
    around.goal = around.world.other
    commands = [["stages/index.py"], ["stages/preprocess.py"]]
    disturbed = around.rng.choice(commands)
    if disturbed == commands[1]:
        around.start(commands[0]).succeed()
    run = around.start(disturbed)
    around.wait(around.world.seconds[Path(disturbed[0]).stem])
    for name in around.rng.sample("ae", 2):
        _rewrite(around.project / f"music/{name}.wav", (around.world.other / f"music/{name}.wav").read_bytes())
    if not run.ended() and not re.search("run again|nothing usable", run.message):
        raise Broken(run.text)
    around.check()
    return around.settle(*commands, ["stages/convert.py"])


def truncated(pattern, maker, readers, around):
    """A file that somebody left truncated."""
    reader = around.stage([maker, *readers])
    if reader == maker:
        around.prepare()
    else:
        around.prepare(reader, stale=False)
        pattern = pattern.replace("shards/*", f"shards/{reader}")  # each reads the shards of its own list
    command = around.rng.choice([[f"stages/{reader}.py"], around.repro(reader)])
    file = around.rng.choice(sorted(around.project.folder.glob(pattern)))
    _truncate(file, around.rng)
    around.check(file)
    return around.settle(command)


def truncated_checkpoint(around):
    """A checkpoint that somebody left truncated."""
    around.prepare("train", stale=False)
    run = around.start(["stages/train.py"])
    while run.process.is_alive() and not list((around.project / "models/.checkpoints").glob("*.safetensors")):
        time.sleep(0.002)
    run.process.kill()
    run.ended()
    for file in (around.project / "models/.checkpoints").glob("*.safetensors"):
        _truncate(file, around.rng)
    around.check()
    return around.settle(["stages/train.py"])


MISHAPS = {
    "stage killed": killed_stage,
    "worker process killed": killed_worker,
    "DVC killed": killed_dvc,
    "two `dvc repro` at once": two_at_once,
    "disk full": full_disk,
    "output folder read-only": read_only,
    "audio changes while it is read": changing_audio,
    "index truncated": partial(truncated, "data/index.json", "index", ["preprocess", "convert"]),
    "shard truncated": partial(truncated, "data/shards/*/shard-*.h5", "preprocess", ["train", "convert"]),
    "index of shards truncated": partial(truncated, "data/shards/*/index.json", "preprocess", ["train", "convert"]),
    "rendered music truncated": partial(truncated, "data/corpus/*/*/*.*", "corpus", []),
    "checkpoint truncated": truncated_checkpoint,
    "model truncated": partial(truncated, "models/gae.safetensors", "train", ["convert"]),
    "feature file truncated": partial(truncated, "features/*.h5", "convert", ["plot"]),
}


def happen(name, world, folder, seed):
    """One round of one mishap: `SAME` or `SAID`.

    Raises
    ------
    Broken
        If anything else came of it.
    """
    around = Round(world, folder, seed)
    try:
        return MISHAPS[name](around)
    finally:
        for run in around.runs:
            for process in run.members():
                process.kill()
            run.quiet()
        shutil.rmtree(around.folder, ignore_errors=True)


# ---- files


def outputs(stage):
    """What a stage writes, by dvc.yaml."""
    described = _PIPELINE[stage]["outs"] + _PIPELINE[stage].get("metrics", [])
    return [path if isinstance(path, str) else next(iter(path)) for path in described]


def validate(file):
    """Raise an error unless an output is whole."""
    match file.suffix:
        case ".json":
            read_json(file)
        case ".h5" if file.name.startswith("shard-"):
            shards.read_shard(file)
        case ".h5":
            features.read(file)
        case ".safetensors":
            load_model(file)
        case ".png":
            Image.open(file).load()
        case ".flac":
            audio.probe(file)
        case ".txt":
            assert file.read_text().endswith("\n"), "no last line"
        case ".tsv":
            rows = file.read_text().split("\n")[:-1]  # a curve grows row by row: the last may be on its way
            assert len({row.count("\t") for row in rows}) <= 1, rows
        case _:
            raise AssertionError(f"no output: {file}")


def _is_output(path):
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and any(Path(output) in (path, *path.parents) for stage in _PIPELINE for output in outputs(stage))


def _maker(path):
    return next(stage for stage in _PIPELINE for output in outputs(stage) if Path(output) in (Path(path), *Path(path).parents))


def _files(folder):
    """All files but those of git, DVC and Python."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in (".git", ".dvc", "__pycache__")]
        yield from (Path(place) / name for name in names)


def _content(project):
    """What is in all files, but for speeds and for what depends on the time."""
    names = {file.relative_to(project.folder).as_posix(): file for file in _files(project.folder)}
    return {name: _SPEEDS.sub(b"", file.read_bytes()) for name, file in names.items() if name not in ("dvc.lock", *_OWN["index"])}


def _size(path):
    return sum(file.stat().st_size for file in _files(path)) if path.is_dir() else path.stat().st_size


def _remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _copy(source, target):
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        shutil.copy2(source, target)


def _sing(project, name, frequency):
    soundfile.write(project / f"music/{name}.wav", tiny.tone(16, 8000, frequency), 8000)


def _rewrite(file, content):
    """Write a file in place, as slowly as a recorder."""
    with open(file, "wb", buffering=0) as opened:
        for start in range(0, len(content), 1 << 14):
            opened.write(content[start : start + (1 << 14)])
            time.sleep(0.01)


def _truncate(file, rng):
    os.truncate(file, rng.randrange(file.stat().st_size - 1))  # JSON without its last line's end is whole


# ---- disks


def _mount(*arguments):
    """Whether something could be mounted: as a rule root may."""
    with suppress(OSError):
        return subprocess.run(["mount", *map(str, arguments)], stderr=subprocess.DEVNULL).returncode == 0
    return False


@contextmanager
def _small_disk(folder):
    """Yield a function that leaves so many bytes free below a folder, and returns a limit on files where it can't mount a disk."""
    folder.mkdir(parents=True)
    mounted = _mount("-t", "tmpfs", "none", folder)

    def resize(left):
        if not mounted:
            return left and max(1 << 14, left // 4)  # of one file among some; what is said must fit too
        used = 0 if left is None else shutil.disk_usage(folder).used + left
        subprocess.run(["mount", "-o", f"remount,size={used}", folder], check=True)  # 0 is no limit

    try:
        yield resize
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def _write_protected(folder):
    """A folder that is read-only, for root too."""
    if mounted := _mount("--bind", folder, folder):
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
    elif os.geteuid() == 0:
        raise Impossible("root writes anywhere but on what is mounted read-only, and nothing can be mounted here")
    else:
        folder.chmod(0o555)
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)
        else:
            folder.chmod(0o755)
