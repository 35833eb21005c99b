"""DVC's other commands on the tiny project: experiments and comparisons; moving data is in test_remotes.py."""

import json
import time

import pytest
from project import stages_that_ran

AFTER_TRAINING = ["train", "convert", "evaluate", "plot"]


@pytest.fixture(scope="module")
def experiments(finished_project, tmp_path_factory):
    """The project after an experiment in place, `wide`, and one from the queue, `half`; with what the commands printed."""
    project = finished_project.copy(tmp_path_factory.mktemp("experiments") / "gae")
    project.printed = {"wide": project.run("dvc", "exp", "run", "-n", "wide", "-S", "model.n_maps=128")}
    project.run("dvc", "exp", "run", "--queue", "-n", "half", "-S", "convert.dtype=float16")
    project.run("dvc", "queue", "start")
    try:
        _wait_for_queue(project)
        project.printed["half"] = project.run("dvc", "queue", "logs", "half")
    finally:
        project.run("dvc", "queue", "stop")
    return project


def _wait_for_queue(project):
    for _ in range(600):
        status = project.run("dvc", "queue", "status")
        if "Running" not in status and "Queued" not in status:
            break
        time.sleep(0.5)
    assert "Success" in status, status + project.run("dvc", "queue", "logs", "half")


def test_an_experiment_does_not_preprocess_again(experiments):
    assert stages_that_ran(experiments.printed["wide"]) == ["index", *AFTER_TRAINING]


def test_a_queued_experiment_runs_in_a_copy_of_the_repository(experiments):
    # based on the workspace, in which `wide` is applied
    assert stages_that_ran(experiments.printed["half"]) == ["index", "convert", "plot"]
    assert "convert.dtype=float16" not in (experiments / "params.yaml").read_text()
    features = json.loads(experiments.run("dvc", "exp", "show", "--json"))
    assert "half" in json.dumps(features)


def test_experiments_are_shown_with_parameters_and_metrics(experiments):
    rows = experiments.run("dvc", "exp", "show", "--csv", "--no-pager").splitlines()
    header = rows[0].split(",")
    table = {row.split(",")[0] or row.split(",")[1]: dict(zip(header, row.split(","), strict=True)) for row in rows[1:]}
    assert table["main"]["model.n_maps"] == "8" and table["wide"]["model.n_maps"] == "128"
    assert table["half"]["convert.dtype"] == "float16" and table["wide"]["convert.dtype"] == "float32"
    assert {"loss", "frames_per_second", "gae.top1", "gae.top1_stacked", "chroma.top1", "reconstruction_error", "times_real_time"} <= set(
        header
    )


def test_metrics_and_parameters_of_experiments_are_compared(experiments):
    compared = experiments.run("dvc", "params", "diff", "main", "wide").splitlines()
    assert [row.split() for row in compared] == [["Path", "Param", "main", "wide"], ["params.yaml", "model.n_maps", "8", "128"]]
    differences = json.loads(experiments.run("dvc", "metrics", "diff", "main", "wide", "--json"))
    loss = differences["models/metrics.json"]["loss"]
    assert loss["old"] != loss["new"]
    assert "gae.top1" in experiments.run("dvc", "metrics", "diff", "--all", "wide", "half")
    shown = experiments.run("dvc", "metrics", "show")
    assert "gae.top1_stacked" in shown and "models/metrics.json" in shown
    rows = experiments.run("dvc", "metrics", "diff", "--all", "main", "wide")
    assert "gae.beats_50ms" in rows and "cqt_shifted_back.top1" in rows
    assert max(map(len, rows.splitlines())) < 100  # fits a screen


def test_plots_show_curves_and_images_side_by_side(experiments):
    experiments.run("dvc", "plots", "show", "--out", "shown")
    page = (experiments / "shown/index.html").read_text()
    assert "plots_training_plots_metrics_loss_tsv" in page and '"step"' in page
    assert "static/workspace_plots_figures_reconstruction.png" in page

    printed = experiments.run("dvc", "plots", "diff", "main", "wide", "--out", "compared")
    page = (experiments / "compared/index.html").read_text()
    assert "WARNING" not in printed
    for revision in ("main", "wide"):
        assert f'"rev": "{revision}"' in page
        assert f"static/{revision}_plots_figures_reconstruction.png" in page
        assert (experiments / f"compared/static/{revision}_plots_figures_reconstruction.png").read_bytes().startswith(b"\x89PNG")


def test_a_clone_that_pulled_everything_has_nothing_to_do(finished_project, tmp_path):
    project = finished_project.copy(tmp_path / "gae")
    project.run("dvc", "push")
    clone = project.clone(tmp_path / "clone")
    clone.run("dvc", "pull")
    assert clone.files("features") == project.files("features")
    assert clone.repro()[0] == ["index"]
    assert clone.run("git", "status", "--short") == ""


def test_an_experiment_that_is_broken_off_leaves_weights_and_metrics(finished_project, tmp_path):
    project = finished_project.copy(tmp_path / "gae")
    before = project.files("models")
    printed = project.run("dvc", "exp", "run", "-S", "train.weight_decay=1e38", fails=True)
    assert "between steps 0 and 1" in printed and project.files("models") == before
    project.run("git", "restore", "params.yaml")
    assert stages_that_ran(project.run("dvc", "exp", "run", "-S", "plot.dpi=51")) == ["index", "plot"]
    assert project.files("models") == before
