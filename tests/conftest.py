import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch starts: tiny matrices are no work for many threads

import project
import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("repeatable")


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
