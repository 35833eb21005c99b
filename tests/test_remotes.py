"""Weights, features and all the rest to a remote and back, and a model from one project to another.

Nothing is computed here: small files stand where the stages would write, and DVC records them as if they had.
"""

import contextlib
import re
from pathlib import Path

import boto3
import pytest
import yaml
from project import Project
from servers import s3_server, ssh_server

from gae.modelfile import SHIPPED

NAMED = {"weights": ["models/gae.safetensors"], "features": ["features"], "everything": []}


@pytest.fixture(scope="module")
def recorded(fresh_project, tmp_path_factory):
    """A project as if all of its stages had run, committed. Not to be changed: `copy` it."""
    project = fresh_project.copy(tmp_path_factory.mktemp("recorded") / "gae")
    for out in _outputs(project):
        for path in [project / out] if Path(out).suffix else [project / out / "1.h5", project / out / "2.h5"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(path.relative_to(project.folder)))
    for name in ("metrics.json", "models/metrics.json"):
        (project / name).write_text("{}")
    project.run("dvc", "commit", "--force")
    project.commit()
    return project


@pytest.mark.parametrize("named", NAMED.values(), ids=NAMED)
def test_what_is_named_moves_and_nothing_else(named, recorded, remote, tmp_path):
    project = recorded.copy(tmp_path / "gae")
    remote(project)
    contents = _contents(project, named)
    folders = [out for out in named or _outputs(project) if (project / out).is_dir()]
    assert _pushed(project.run("dvc", "push", *named)) == len(contents) + len(folders)
    assert "Everything is up to date" in project.run("dvc", "push", *named)

    clone = project.clone(tmp_path / "clone")
    assert _contents(clone) == {}
    clone.run("dvc", "pull", *named)
    assert _contents(clone) == contents
    assert clone.run("git", "status", "--short") == ""


def test_one_more_feature_file_moves_one_file_and_the_list_of_them(recorded, tmp_path):
    project = recorded.copy(tmp_path / "gae")
    project.run("dvc", "push", "features")
    (project / "features/3.h5").write_text("one more")
    project.run("dvc", "commit", "--force", "convert")
    assert _pushed(project.run("dvc", "push", "features")) == 2


def test_the_default_remote_is_a_folder_beside_the_checkout(recorded, tmp_path):
    project = recorded.copy(tmp_path / "gae")
    assert "1 file pushed" in project.run("dvc", "push", "models/gae.safetensors")
    assert [file for file in (tmp_path / "gae-storage").rglob("*") if file.is_file()] != []


def test_what_was_never_pushed_is_named(recorded, tmp_path):
    clone = recorded.clone(tmp_path / "clone")
    assert "features" in clone.run("dvc", "pull", "features", fails=True)


def test_another_project_gets_the_shipped_weights_and_follows_them(recorded, other, tmp_path):
    project = recorded.copy(tmp_path / "gae")
    shipped = project / "models/pretrained.safetensors"
    other.run("dvc", "get", _address(project), "models/pretrained.safetensors", "--out", "got.safetensors")
    other.run("dvc", "import", _address(project), "models/pretrained.safetensors", "--out", "weights.safetensors")
    assert (other / "got.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes() == shipped.read_bytes()
    locked = yaml.safe_load((other / "weights.safetensors.dvc").read_text())["deps"][0]["repo"]
    assert locked == {"url": _address(project), "rev_lock": project.run("git", "rev-parse", "HEAD").strip()}

    shipped.write_bytes(b"better weights")
    project.commit()
    other.run("dvc", "update", "weights.safetensors.dvc")
    assert (other / "weights.safetensors").read_bytes() == b"better weights"


def test_another_project_imports_trained_weights_from_the_remote(recorded, other, tmp_path):
    project = _sharing(recorded, tmp_path)
    other.run("dvc", "import", _address(project), "models/gae.safetensors")
    assert (other / "gae.safetensors").read_bytes() == (project / "models/gae.safetensors").read_bytes()


def test_each_version_of_a_model_is_found_by_its_tag(recorded, other, tmp_path):
    project = _sharing(recorded, tmp_path)
    first = (project / "models/gae.safetensors").read_bytes()
    project.run("git", "tag", "--annotate", "--message", "The first", "gae@v1.0.0")
    (project / "models/gae.safetensors").write_bytes(b"trained again")
    project.run("dvc", "commit", "--force", "train")
    project.commit()
    project.run("dvc", "push", "models/gae.safetensors")
    project.run("gto", "register", "gae", "--version", "v2.0.0")
    assert re.search(r"gae +│ v2.0.0", project.run("gto", "show"))

    for version, expected in {None: b"trained again", "v1.0.0": first, "v2.0.0": b"trained again"}.items():
        revision = ["--rev", version] if version else []
        other.run("dvc", "artifacts", "get", _address(project), "gae", *revision, "--out", f"{version}.safetensors")
        assert (other / f"{version}.safetensors").read_bytes() == expected
    assert "Unable to find artifact" in other.run("dvc", "artifacts", "get", _address(project), "gae", "--rev", "v3.0.0", fails=True)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_registry_holds_the_shipped_weights_too(recorded, other, tmp_path, name):
    project = recorded.copy(tmp_path / "gae")
    project.run("gto", "register", name, "--version", "v1.0.0")
    assert "Downloaded 1 file(s)" in other.run("dvc", "artifacts", "get", _address(project), name)
    assert (other / f"{name}.safetensors").read_bytes() == (project / f"models/{name}.safetensors").read_bytes()


def test_all_that_the_registry_lists_is_there(recorded):
    for artifact in yaml.safe_load((recorded / "dvc.yaml").read_text())["artifacts"].values():
        assert artifact["type"] == "model" and (recorded / artifact["path"]).is_file()


@pytest.fixture
def other(tmp_path):
    """An empty project of somebody else, on the same machine."""
    project = Project(tmp_path / "other")
    project.folder.mkdir()
    project.run("git", "init", "--quiet")
    project.run("dvc", "init", "--quiet")
    return project


@pytest.fixture(scope="module", params=["folder", "s3", "ssh"])
def remote(request, tmp_path_factory):
    """A function that sets a place of its own for a project, on one of the remotes, as its default remote."""
    with {"folder": _folder, "s3": _s3, "ssh": _ssh}[request.param](tmp_path_factory.mktemp("remote")) as options:

        def choose(project):
            for option, value in options.items():
                place = f"/{project.folder.parent.name}" if option == "url" else ""
                project.run("dvc", "remote", "modify", "storage", option, value + place)
            project.commit()

        yield choose


@contextlib.contextmanager
def _folder(place):
    yield {"url": str(place)}


@contextlib.contextmanager
def _s3(_):
    """An S3 server on the loopback interface."""
    with pytest.MonkeyPatch.context() as environment, s3_server() as address:
        environment.setenv("AWS_ACCESS_KEY_ID", "nobody")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        boto3.client("s3", endpoint_url=address, region_name="us-east-1").create_bucket(Bucket="gae")
        yield {"url": "s3://gae", "endpointurl": address}


@contextlib.contextmanager
def _ssh(place):
    with ssh_server(place) as address:
        yield {"url": f"{address}{place}", "keyfile": str(place / "user")}


def _outputs(project):
    """What DVC keeps of a project: the outputs of all stages, as dvc.yaml names them."""
    stages = yaml.safe_load((project / "dvc.yaml").read_text())["stages"].values()
    return [next(iter(out)) if isinstance(out, dict) else out for stage in stages for out in stage["outs"]]


def _contents(project, named=()):
    """What is in the outputs that are named, by path; in all of them if none is."""
    files = [file for out in named or _outputs(project) for file in [project / out, *(project / out).rglob("*")] if file.is_file()]
    return {file.relative_to(project.folder).as_posix(): file.read_bytes() for file in files}


def _pushed(printed):
    """How many files DVC says it has moved."""
    return int(re.search(r"(\d+) files? pushed", printed)[1])


def _sharing(recorded, folder):
    """A copy of the project whose weights are on a remote that others reach by the same address."""
    project = recorded.copy(folder / "gae")
    project.run("dvc", "remote", "modify", "storage", "url", str(folder / "shared"))
    project.commit()
    project.run("dvc", "push", "models/gae.safetensors")
    return project


def _address(project):
    """As of a repository elsewhere: git clones it, and finds no cache of DVC's beside it."""
    return project.folder.as_uri()
