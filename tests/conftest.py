import os
import subprocess
import sys
from collections import defaultdict

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch starts: tiny matrices are no work for many threads

import filelock
import project
import pytest
import servers
import tiny
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("repeatable")


LONGEST = ["train", "pipeline", "storage", "remotes", "corpus", "dvc_commands", "faults", "fuzz", "evaluate"]


def pytest_collection_modifyitems(items):
    """Files that take long come first: at the end one worker would be at them while the others have nothing left."""
    order = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def fresh_project(tmp_path_factory):
    """A tiny project in which nothing has run. Not to be changed: `copy` it."""
    return project.fresh(tmp_path_factory.mktemp("fresh") / "gae")


@pytest.fixture(scope="session")
def finished_project(fresh_project, tmp_path_factory):
    """The tiny project after its first `dvc repro`, committed: one for all workers. Not to be changed: `copy` it."""
    own = tmp_path_factory.getbasetemp()
    place = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "finished"
    with filelock.FileLock(f"{place}.lock"):
        if not place.exists():
            finished = fresh_project.copy(own / "unfinished" / "gae")
            ran, _ = finished.repro()
            assert ran == project.STAGES
            finished.commit()
            (own / "unfinished").rename(place)
    return project.Project(place / "gae")


@pytest.fixture(scope="session")
def s3():
    """The address of an S3 server on the loopback interface."""
    with servers.s3_server() as address:
        yield address


@pytest.fixture
def in_this_process(monkeypatch):
    """Work over many tracks is done in this process, in order.

    Gives what it was done on, by the name of the function: paths, where items have one.
    """
    from gae import convert, evaluate, index, plot, preprocess  # not in the way of tests without them

    done = defaultdict(list)

    def map_here(function, items, *rest, **more):
        def noted(item, *arguments):
            done[function.__name__].append(item["path"] if isinstance(item, dict) and "path" in item else item)
            return function(item, *arguments)

        return tiny.map_here(noted, items, *rest, **more)

    for module in (convert, evaluate, index, plot, preprocess):
        monkeypatch.setattr(module, "map_tracks", map_here)
    return done


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers in processes of their own: (address, workers)."""
    import distributed  # not in the way of tests without a cluster

    address = f"tcp://127.0.0.1:{servers.free_port()}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "DASK_DISTRIBUTED__WORKER__DAEMON": "False"}
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    dask = [sys.executable, "-m", "dask"]
    scheduler = subprocess.Popen([*dask, "scheduler", "--host", address, "--no-dashboard"], **quiet)
    worker = [*dask, "worker", address, "--nthreads", "1", "--no-dashboard", "--no-nanny", "--local-directory", str(tmp_path)]
    workers = [subprocess.Popen(worker, **quiet) for _ in range(2)]
    try:
        with distributed.Client(address, timeout="60s") as client:
            client.wait_for_workers(2, timeout=60)
        yield address, workers
    finally:
        for process in [*workers, scheduler]:
            process.kill()
            process.wait()
