import os
import socket
import subprocess
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch starts: tiny matrices are no work for many threads

import project
import pytest
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
    """The tiny project after its first `dvc repro`, committed. Not to be changed: `copy` it."""
    finished = fresh_project.copy(tmp_path_factory.mktemp("finished") / "gae")
    ran, _ = finished.repro()
    assert ran == project.STAGES
    finished.commit()
    return finished


@pytest.fixture(scope="session")
def s3():
    """The address of an S3 server on the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for_port(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _wait_for_port(port, server):
    for _ in range(600):
        assert server.poll() is None, "moto_server ended at once"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("moto_server does not answer")


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers in processes of their own: (address, workers)."""
    import distributed  # not in the way of tests without a cluster

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
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
