"""Work over tracks: the same results from processes, from a Dask cluster, and from one that loses a worker."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask
import dask_jobqueue  # noqa: F401  its defaults would go with what a test sets for a while, if that came first
import distributed
import pytest

from gae import compute as computing
from gae.compute import map_tracks, submitting
from gae.errors import GaeError
from gae.params import Compute, validate


def slow_copy(item, folder):
    """A unit of work: writes what it was given, late enough for a worker to be killed meanwhile."""
    time.sleep(0.15)
    with open(os.path.join(folder, f"{item}.txt"), "a") as file:
        file.write(f"{item}\n")
    return item, os.getpid()


def die(_):
    os.kill(os.getpid(), 9)


def end_first_job(item, jobs):
    """A unit of work in whose midst the first of the listed jobs ends."""
    first, *others = Path(jobs).read_text().split()
    if not others:
        os.killpg(int(first), signal.SIGKILL)
    return item


def test_a_cluster_that_loses_a_worker_gives_what_processes_give(cluster, tmp_path):
    address, workers = cluster
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    items = list(range(24))
    local = map_tracks(slow_copy, items, Compute(workers=2), "local", (str(here),))
    killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({workers[0].pid}, 9)"])
    remote = map_tracks(slow_copy, items, Compute(scheduler=address), "remote", (str(there),))
    killer.wait()
    assert workers[0].wait(timeout=10) == -9
    assert [item for item, _ in remote] == [item for item, _ in local] == items
    assert {file.name for file in there.iterdir()} == {file.name for file in here.iterdir()}
    assert workers[1].pid in {pid for _, pid in remote}


def test_relative_paths_mean_what_they_mean_to_the_caller(cluster, tmp_path, monkeypatch):
    (tmp_path / "music").mkdir()
    monkeypatch.chdir(tmp_path / "music")
    map_tracks(slow_copy, ["song"], Compute(scheduler=cluster[0]), "remote", (".",))
    with submitting(Compute(scheduler=cluster[0])) as submit:
        submit(slow_copy, "corpus", ".").result()
    assert {file.name: file.read_text() for file in (tmp_path / "music").iterdir()} == {"song.txt": "song\n", "corpus.txt": "corpus\n"}


def test_threads_of_one_worker_wait_for_their_folder(tmp_path, monkeypatch):
    """Those of two projects, which share a cluster."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: computing._at(str(tmp_path / "ab"[n % 2]), None, None, slow_copy, n, "."), range(8)))
    for n, name in enumerate("ab"):
        assert {path.name for path in (tmp_path / name).iterdir()} == {f"{number}.txt" for number in range(n, 8, 2)}


@pytest.mark.parametrize(
    ("address", "why"),
    [("tcp://localhost", "allowed"), ("tcp://localhost:abc", "allowed"), ("tls://localhost:9", "compute.scheduler: tls")],
)
def test_an_address_that_is_none_is_one_line(address, why):
    with pytest.raises(GaeError, match=why) as caught:
        map_tracks(slow_copy, [1], validate({"compute": {"scheduler": address}}).compute, "remote", (".",))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("workers", "told"), [(0, "warning: Dask: no worker is there, and nothing moves until one comes; start some\n"), (1, "")]
)
def test_a_cluster_without_workers_is_told(monkeypatch, capsys, workers, told):
    monkeypatch.setattr(computing, "_LONELY", 0.3)
    with (
        distributed.LocalCluster(n_workers=workers, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        computing._company(client, "start some"),
    ):
        time.sleep(1)
    assert capsys.readouterr().err == told


def test_a_worker_in_another_folder_of_that_name_is_refused(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    map_tracks(slow_copy, [1], Compute(scheduler=cluster[0]), "remote", (".",))
    assert not list(tmp_path.glob(".gae-*"))
    with pytest.raises(GaeError, match=r"not seen by the worker on .* \(another of that name is there\); share it"):
        computing._at(str(tmp_path), str(tmp_path / "mark"), None, slow_copy, 2, ".")


def test_a_track_that_kills_its_workers_is_one_line():
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}), pytest.raises(GaeError, match="Dask: a track killed its workers"):
        map_tracks(die, [1], Compute(cluster="local", workers=1), "remote")


def test_no_scheduler_is_one_line(monkeypatch):
    monkeypatch.setattr("gae.compute._PATIENCE", 1)
    with pytest.raises(GaeError, match=r"^compute\.scheduler: no Dask scheduler answers at tcp://127\.0\.0\.1:9") as error:
        map_tracks(die, [1], Compute(scheduler="tcp://127.0.0.1:9"), "remote")
    assert "\n" not in str(error.value)


def test_a_killed_process_is_one_line():
    with pytest.raises(GaeError, match="a worker process was killed"):
        map_tracks(die, [1, 2], Compute(workers=2), "local")
    with pytest.raises(GaeError, match="a worker process was killed"), submitting(Compute(workers=1)) as submit:
        submit(die, 1).result()


def test_a_cluster_of_this_machine_gives_what_processes_give(tmp_path):
    reports = map_tracks(slow_copy, [1, 2, 3], Compute(cluster="local", workers=2), "local", (str(tmp_path),))
    assert [item for item, _ in reports] == [1, 2, 3] and os.getpid() not in {pid for _, pid in reports}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """SLURM's commands, played: a job runs here, in a session of its own. Gives the file that lists the jobs."""
    jobs = tmp_path / "jobs"
    # the script of a job is gone as soon as it is submitted
    submit = f'job=$(mktemp -p {tmp_path}); cp "$1" $job; setsid sh $job > $job.out 2>&1 & echo $! | tee -a {jobs}'
    for name, script in {"sbatch": f'[ "$1" = --test-only ] && exit; {submit}', "scancel": 'kill -- "-$1"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    settings = {"cores": 2, "memory": "1GB", "processes": 2, "local-directory": str(tmp_path), "log-directory": str(tmp_path)}
    with dask.config.set({f"jobqueue.slurm.{key}": value for key, value in settings.items()}):
        yield jobs


def test_a_cluster_is_started_through_slurm(slurm, tmp_path):
    reports = map_tracks(slow_copy, [1, 2, 3], Compute(cluster="slurm", workers=2), "slurm", (str(tmp_path),))
    assert [item for item, _ in reports] == [1, 2, 3] and os.getpid() not in {pid for _, pid in reports}
    assert len(slurm.read_text().split()) == 2


def test_a_job_that_slurm_ends_is_followed_by_another(slurm, tmp_path):
    """As at its time limit, with all that runs in it."""
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}):
        reports = map_tracks(end_first_job, [1, 2], Compute(cluster="slurm", workers=1), "slurm", (str(slurm),))
    assert reports == [1, 2] and len(slurm.read_text().split()) == 2


def test_jobs_that_slurm_refuses_leave_the_work_to_the_others(slurm, tmp_path, capfd):
    """As above a limit of jobs a user, which the first is not."""
    submit = tmp_path / "sbatch"
    refuse = f'[ "$1" = --test-only ] || mkdir {tmp_path}/taken || {{ echo above the limit >&2; exit 1; }}'
    submit.write_text(submit.read_text().replace("\n", f"\n{refuse}\n", 1))
    reports = map_tracks(slow_copy, [1, 2, 3], Compute(cluster="slurm", workers=2), "slurm", (str(tmp_path),))
    assert [item for item, _ in reports] == [1, 2, 3] and len(slurm.read_text().split()) == 1
    said = capfd.readouterr().err
    assert said.count("warning: SLURM refuses a job, and leaves its work to the others: ") == 1 and "above the limit" in said
    assert "Traceback" not in said


def test_a_configuration_of_jobs_that_fits_no_machine_is_one_line(slurm):
    with dask.config.set({"jobqueue.slurm.interface": "nowhere0"}), pytest.raises(GaeError, match=r"nowhere0.* Correct .*jobqueue\.yaml"):
        map_tracks(slow_copy, [1], Compute(cluster="slurm", workers=1), "slurm", (".",))


def test_slurm_without_its_commands_or_the_size_of_a_job_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GaeError, match=r"no sbatch on this machine"):
        map_tracks(slow_copy, [1], Compute(cluster="slurm", workers=1), "slurm", (str(tmp_path),))
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    sizes = {"jobqueue.slurm.cores": None}  # whatever this machine's configuration has
    with dask.config.set(sizes), pytest.raises(GaeError, match=r"cores.*jobqueue\.yaml: docs/scale\.md"):
        map_tracks(slow_copy, [1], Compute(cluster="slurm", workers=1), "slurm", (str(tmp_path),))


def test_a_job_that_slurm_refuses_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text(
        "#!/bin/sh\ngrep -q -- --mem=63G $2 && echo 'sbatch: error: Memory can not be\nsatisfied' >&2\nexit 1\n"
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    refused = r"SLURM takes no such job \(sbatch: error: Memory can not be satisfied\); change it in .*jobqueue\.yaml"
    settings = {**dask.config.get("jobqueue.slurm"), "cores": 1, "memory": "63GiB"}
    with dask.config.set({"jobqueue.slurm": settings}), pytest.raises(GaeError, match=refused):
        map_tracks(slow_copy, [1], Compute(cluster="slurm", workers=1), "slurm", (str(tmp_path),))


BUSY = """
import os
import time
from gae.commandline import one_line_errors
from gae.compute import map_tracks
from gae.params import Compute

def work(item):
    os.write(1, b"at work\\n")
    time.sleep(1)

if __name__ == "__main__":
    with one_line_errors("busy.py"):
        map_tracks(work, list(range(40)), Compute(workers=2), "busy")
"""


@pytest.mark.parametrize("apart", [0.05, 0.2])
def test_ctrl_c_twice_ends_everything_in_one_line(tmp_path, apart):
    (tmp_path / "busy.py").write_text(BUSY)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    busy = subprocess.Popen([sys.executable, "busy.py"], cwd=tmp_path, env=environment, start_new_session=True, **pipes)
    try:
        assert busy.stdout.readline() == "at work\n"
        for _ in range(2):
            os.killpg(busy.pid, signal.SIGINT)
            time.sleep(apart)
        said = busy.communicate(timeout=60)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(busy.pid, signal.SIGKILL)
    assert busy.returncode == 1
    assert said.splitlines()[-1] == "busy.py: interrupted; run it again to go on" and "Traceback" not in said


INTERRUPTED = """
import signal
from gae.commandline import one_line_errors
from gae.compute import submitting
from gae.params import Compute

with one_line_errors("busy.py"), submitting(Compute(cluster="slurm", workers=1)):
    signal.raise_signal(signal.SIGINT)
"""


def test_ctrl_c_is_no_success_where_slurm_is_used(slurm):
    sizes = {"DASK_JOBQUEUE__SLURM__CORES": "1", "DASK_JOBQUEUE__SLURM__MEMORY": "1GB"}
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], env=os.environ | sizes, cwd=slurm.parent, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "busy.py: interrupted; run it again to go on"


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "None")],
)
def test_threads_of_stages_wait_for_each_other_a_little_while_unless_told_otherwise(given, found):
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", "import checkout, os; print(os.environ.get('GOMP_SPINCOUNT'))"]
    stages = Path(__file__).parents[1] / "stages"
    printed = subprocess.run(command, cwd=stages, env=environment | given, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == found
