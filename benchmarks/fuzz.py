"""Files of somebody else's, for as long as you like: damaged, made of parts that lie, and bred by the code that they reach.

    python benchmarks/fuzz.py [--seconds 60] [--only NAME] [--engine both]

What reads them, and from which files the tries start: tests/strangers.py. Hypothesis damages files and builds such as lie;
atheris (pip install atheris) breeds them by coverage of `gae` and PyYAML. Each target is read in a process of its own, of limited
memory, with an alarm; one that dies or hangs all the same is noted and started again. Ends with exit code 1 if anything
but a result or one line came of a file; such files are kept.
"""

import argparse
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
ENGINES = ["hypothesis", "atheris"] if importlib.util.find_spec("atheris") else ["hypothesis"]
ALLOWANCE = 4 << 30  # bytes of address space beyond what a process has when it begins
STALL = 60  # s without a new input after which a process hangs: the alarm rings between two lines of Python only
COUNTS = ["tried", "accepted", "refused", "else"]
DEEDS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")


def main():
    given = _arguments()
    if given.child:
        return Child(given).run()
    import strangers

    names = [target.name for target in strangers.TARGETS]
    if given.only and given.only not in names:
        sys.exit(f"--only {given.only}: one of {', '.join(names)}")
    print("| target | inputs tried | accepted | refused in one line | anything else |")
    print("| --- | --- | --- | --- | --- |")
    findings, total = [], np.zeros(4, int)
    for name in [given.only] if given.only else names:
        counts, found = _supervise(name, given)
        findings += found
        total += counts
        print(f"| {name} | " + " | ".join(f"{count:,}" for count in counts) + " |", flush=True)
    print("| all | " + " | ".join(f"{count:,}" for count in total) + " |")
    print(f"\n(by {' and '.join(_engines(given))})")
    for finding in findings:
        print(finding)
    sys.exit(1 if total[3] else 0)


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target (default: %(default)s)")
    parser.add_argument("--only", metavar="NAME", help="one target")
    parser.add_argument("--engine", choices=["hypothesis", "atheris", "both"], default="both")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "gae-fuzz", help="folder for files that did harm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _engines(given):
    return ENGINES if given.engine == "both" else [given.engine]


def _supervise(name, given):
    """Counts of one target, and what was found, line by line."""
    counts, findings = np.zeros(4, int), []
    for engine in _engines(given):
        until, seed = time.monotonic() + given.seconds / len(_engines(given)), given.seed
        while (left := until - time.monotonic()) > 1:
            with tempfile.TemporaryDirectory() as folder:
                counts += _one_child(name, engine, left, seed, Path(folder), given.keep, findings)
            seed += 1
    return counts, findings


def _one_child(name, engine, seconds, seed, folder, keep, findings):
    counts = np.memmap(folder / "counts", np.int64, "w+", shape=4)
    command = [sys.executable, __file__, "--child", folder, "--only", name, "--engine", engine]
    command += ["--seconds", str(seconds), "--seed", str(seed), "--keep", keep]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        tried, since = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            if counts[0] != tried:
                tried, since = int(counts[0]), time.monotonic()
            if time.monotonic() - since > STALL:
                process.kill()
    if process.returncode:
        end = "hangs" if process.returncode == -signal.SIGKILL else f"ends the process with {process.returncode}"
        if not counts[0]:
            sys.exit(f"{name}, {engine}: {end} before any input:\n{(folder / 'log').read_text(errors='replace')[-2000:]}")
        counts[3] += 1
        findings.append(_kept(name, end, (folder / "last").read_bytes(), keep))
    if (folder / "findings").exists():
        findings += [json.loads(line) for line in (folder / "findings").read_text().splitlines()]
    return np.array(counts)


def _kept(name, said, data, keep):
    """One line on a file that did harm, which is kept."""
    import hashlib

    keep.mkdir(parents=True, exist_ok=True)
    path = keep / f"{re.sub(r'[^a-z0-9]+', '-', name)}-{hashlib.sha256(data).hexdigest()[:8]}"
    path.write_bytes(data)
    return f"{name}: {said} ({path})"


class Child:
    """The process that reads files for one target."""

    def __init__(self, given):
        self.folder, self.engine, self.seed, self.keep = given.child, given.engine, given.seed, given.keep
        self.seconds = given.seconds
        self.strangers = self._imported()
        self.target = next(target for target in self.strangers.TARGETS if target.name == given.only)
        self.counts = np.memmap(self.folder / "counts", np.int64, "r+", shape=4)
        self.known, self.deeds, self.watching = set(), [], False

    def run(self):
        """Read files until the time is over."""
        with self.strangers.furnished(self.target, self.folder / "place"):
            tempfile.tempdir = str(self.folder)
            seeds = self.target.seeds()
            self.strangers.outcome(self.target, seeds[0])  # what is imported late takes memory once
            used = int(re.search(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10
            resource.setrlimit(resource.RLIMIT_AS, (used + ALLOWANCE, used + ALLOWANCE))
            sys.addaudithook(self._audit)
            self.until = time.monotonic() + self.seconds
            for seed in seeds:
                self.attempt(seed)
            if self.engine == "atheris":
                self._breed(seeds)
            else:
                self._build()

    def attempt(self, data):
        """Let the target read one file, and count how that ended."""
        (self.folder / "last").write_bytes(data)
        self.counts[0] += 1
        self.deeds.clear()
        self.watching = True
        said = self.strangers.outcome(self.target, data)
        self.watching = False
        said = f"did {self.deeds[0]}" if self.deeds else said
        self.counts[COUNTS.index(said) if said in COUNTS else 3] += 1
        kind = re.sub(r"\d+|'.*'", "_", said)[:80]
        if said not in COUNTS and kind not in self.known:
            self.known.add(kind)
            with open(self.folder / "findings", "a") as file:
                file.write(json.dumps(_kept(self.target.name, said, data, self.keep)) + "\n")

    def _imported(self):
        guide = nullcontext()
        if self.engine == "atheris":
            import atheris

            guide = atheris.instrument_imports(include=["gae", "yaml"])
        with guide:
            import strangers
        return strangers

    def _build(self):
        from hypothesis import HealthCheck, Phase, given, seed, settings

        number = 1000 * self.seed
        while time.monotonic() < self.until:
            number += 1

            @seed(number)
            @settings(max_examples=1000, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
            @given(self.target.files())
            def attempt(data):
                if time.monotonic() < self.until:
                    self.attempt(data)

            attempt()

    def _breed(self, seeds):
        import atheris

        corpus = self.folder / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(seed)
        seconds = max(1, round(self.until - time.monotonic()))
        limits = [f"-max_total_time={seconds}", "-max_len=65536", "-rss_limit_mb=0", f"-timeout={2 * STALL}", f"-seed={self.seed}"]
        atheris.Setup([sys.argv[0], *limits, str(corpus)], self.attempt)
        atheris.Fuzz()  # ends the process

    def _audit(self, event, arguments):
        """Note what a file must not bring about: programs started, connections made, files changed elsewhere."""
        if not self.watching:
            return
        if event.startswith(DEEDS):
            self.deeds.append(event)
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in CHANGES) and not isinstance(arguments[0], int):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith((f"{os.path.realpath(self.folder)}/", "/dev/", f"/proc/{os.getpid()}/")):
                self.deeds.append(f"{event} {path}")


if __name__ == "__main__":
    main()
