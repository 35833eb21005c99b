import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from servers import free_port
from torch._inductor.exc import TritonMissing

from gae import params, pictures, view
from gae import train as module
from gae.batches import Excerpts
from gae.checkpoints import Checkpoints
from gae.errors import FormatError, GaeError, TrainingError, explained
from gae.files import read_json, write_json
from gae.model import GatedAutoencoder
from gae.modelfile import load_model
from gae.processes import gatherer, within_memory
from gae.shards import Shards
from gae.train import Run, Validation, contrast_weight, schedule, split, train

ROOT = Path(__file__).parents[1]
N_LINES, STEPS, VALIDATION_FRAMES = 10, 85, module._VALIDATION_FRAMES


def recipe(**changes):
    """Parameters of a run of a second or less; `changes` are for train."""
    quick = {"steps": STEPS, "batch": 4, "block": 24, "stride": 2, "shift": 8, "contrast_frames": 24, "averaging": 0.9}
    quick |= {"contrast": 0.3, "contrast_kept": 0.1, "temperature": 0.1, "learning_rate": 1.5e-3, "muon_rate": 0.02}
    quick |= {"view_share": 0.5, "validation": 0.1}
    quick |= {"precision": "fp32", "accelerator": "cpu", "dropout": 0.2, "dtype": "float32"}
    sizes = {"n_factors": 16, "n_hidden": 8, "n_maps": 6, "context": 3, "dilation": 2, "transposed": 0}
    return params.validate({"model": sizes, "train": {**quick, **changes}, "plot": {"interval": 30}, "compute": {"checkpoint_seconds": 0}})


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train") / "shards"
    tiny.write_shards(folder, [[tiny.music(120 + 20 * line, line)] for line in range(N_LINES)])
    return folder


@pytest.fixture
def quiet(monkeypatch):
    """Drawings are files of their step, and pauses that validate are many."""
    monkeypatch.setattr(pictures, "draw_network", draw_nothing)
    monkeypatch.setattr(pictures, "draw_losses", lambda history, path: None)
    monkeypatch.setattr(module, "VALIDATION_STEPS", 50)
    monkeypatch.setattr(module, "_VALIDATION_FRAMES", 100)


def draw_nothing(network, cqt, frames, folder, step):
    (folder / f"mapping-{step:07d}.png").write_text(str(step))


def places(folder):
    return {
        "model": folder / "gae.safetensors",
        "metrics": folder / "metrics.json",
        "curves": folder / "training",
        "drawings": folder / "network",
        "checkpoints": folder / "checkpoints",
    }


def learn(settings, shards, folder):
    """Train; what the model file and all the curves hold."""
    train(settings, shards, **places(folder))
    return outcome(folder)


def outcome(folder):
    files = {"model": (folder / "gae.safetensors").read_bytes()}
    return files | {path.name: path.read_bytes() for path in sorted((folder / "training").rglob("*")) if path.is_file()}


class Crash(Exception):
    pass


def fail(*_, **__):
    raise Crash


@pytest.fixture
def crash(monkeypatch):
    """Makes the next run fail before it does a certain step; also counts the steps that are done."""
    update, state = Run.update, {"at": None, "done": []}

    def fragile(run, batch):
        if run.step == state["at"]:
            raise Crash
        state["done"].append(run.step)
        update(run, batch)

    monkeypatch.setattr(Run, "update", fragile)

    def crash(at):
        state["at"] = at
        state["done"].clear()
        return state["done"]

    return crash


@pytest.mark.parametrize(
    ("processor", "precision"),
    [({"avx2": True, "avx512_bf16": False}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
)
def test_the_processor_decides_on_the_precision_unless_it_is_set(shards, tmp_path, quiet, monkeypatch, processor, precision):
    """bfloat16 is hundreds of times as slow where a processor has no products for it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    for asked, used in (("auto", precision), ("bf16", "bf16"), ("fp32", "fp32")):
        learn(recipe(precision=asked, steps=2), shards, tmp_path / asked)
        assert load_model(tmp_path / asked / "gae.safetensors").facts["train"]["precision"] == used


def test_the_same_seed_gives_the_same_bytes(shards, tmp_path, quiet):
    first, second = (learn(recipe(), shards, tmp_path / name) for name in "ab")
    assert first == second
    assert {"model", "loss.tsv", "reconstruction.tsv", "contrast.tsv", "validation_top1.tsv"} <= first.keys()
    assert learn(recipe(seed=2), shards, tmp_path / "c")["model"] != first["model"]


def test_what_a_run_leaves(shards, tmp_path, quiet):
    learn(recipe(), shards, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gae.safetensors", "metrics.json", "network", "training"]
    metrics, model = read_json(tmp_path / "metrics.json"), load_model(tmp_path / "gae.safetensors")
    assert set(metrics) == {"loss", "reconstruction", "contrast", "validation_top1", "step", "steps", "frames_per_second"}
    assert metrics["steps"] == STEPS and metrics["step"] in (50, 85) and metrics["frames_per_second"] > 0
    assert model.facts["train"]["steps"] == STEPS and "devices" not in model.facts["train"]
    assert model.facts["step"] == metrics["step"] and len(model.facts["data"]) == 64
    assert model.facts["metrics"]["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
    assert model.cqt == tiny.CQT and model.sizes == recipe().model
    rows = [line.split("\t") for line in (tmp_path / "training/plots/metrics/loss.tsv").read_text().splitlines()]
    assert rows[0] == ["step", "loss"] and [int(row[0]) for row in rows[1:]] == [1, 25, 50, 75, 85]
    assert float(rows[-1][1]) == model.facts["metrics"]["loss"]
    rows = (tmp_path / "training/plots/metrics/validation_top1.tsv").read_text().splitlines()
    assert [row.split("\t")[0] for row in rows] == ["step", "50", "85"]


@pytest.mark.parametrize(("interval", "drawn"), [(30, [50, 75, 85]), (50, [50, 85]), (1000, [85])])
def test_the_network_is_drawn_at_the_first_pause_after_each_interval(shards, tmp_path, quiet, interval, drawn):
    settings = recipe().model_copy(update={"plot": params.Plot(interval=interval)})
    learn(settings, shards, tmp_path)
    assert sorted(int(path.stem[-7:]) for path in (tmp_path / "network").iterdir()) == drawn


def test_drawings_do_not_depend_on_the_bar(shards, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(view, "tqdm", partial(view.tqdm, disable=True))
    learn(recipe().model_copy(update={"plot": params.Plot(interval=50)}), shards, tmp_path)
    assert sorted(int(path.stem[-7:]) for path in (tmp_path / "network").iterdir()) == [50, 85]


def test_the_bar_is_ended_before_an_error_is_told(shards, tmp_path, quiet, monkeypatch, capfd):
    def full(view, row):
        raise OSError

    monkeypatch.setattr(view.View, "_log", full)
    with pytest.raises(OSError):
        learn(recipe(), shards, tmp_path)
    assert "train:" in (said := capfd.readouterr().err) and said.endswith("\n")


@pytest.mark.parametrize(
    ("at", "changes"),
    [
        ([3], {}),
        ([27, 80], {}),
        ([27, 80], {"optimiser": "adam"}),
        ([60], {"optimiser": "adam", "objective": "reconstruction", "schedule": "constant", "sparsity": 1e-3, "weight_decay": 1e-4}),
        ([60], {"precision": "bf16", "dtype": "float16"}),
    ],
)
def test_a_stopped_run_goes_on_and_ends_where_an_unbroken_one_ends(shards, tmp_path, quiet, crash, at, changes):
    crash(None)
    unbroken = learn(recipe(**changes), shards, tmp_path / "unbroken")
    first = 0
    for step in at:
        done = crash(step)
        with pytest.raises(Crash):
            learn(recipe(**changes), shards, tmp_path / "stopped")
        assert done == list(range(first, step))
        first = max(1, step // 25 * 25)  # what is after the last pause is lost
    done = crash(None)
    assert learn(recipe(**changes), shards, tmp_path / "stopped") == unbroken
    assert done == list(range(first, STEPS))
    assert not (tmp_path / "stopped" / "checkpoints").exists()


def test_a_resumed_run_keeps_its_drawings_and_a_new_one_wipes_them(shards, tmp_path, quiet, crash):
    crash(80)
    with pytest.raises(Crash):
        learn(recipe(), shards, tmp_path)
    curves, network = tmp_path / "training" / "plots" / "metrics", tmp_path / "network"
    (curves / "old.tsv").write_text("from another run")
    (tmp_path / "training" / ".metrics.json.77.partial").write_text("half")
    (network / ".mapping-0000050.png.77.partial").write_text("half")
    for step in (50, 100):  # `dvc exp run` puts back what the last run that ended drew
        (network / f"mapping-{step:07d}.png").write_text("from another run")
    crash(None)
    learn(recipe(), shards, tmp_path)
    assert {path.name: path.read_text() for path in network.iterdir()} == {f"mapping-{n:07d}.png": str(n) for n in (50, 75, 85)}
    assert sorted(path.name for path in (tmp_path / "training").iterdir()) == ["metrics.json", "plots"]
    (network / "mapping-0009999.png").write_text("from another run")
    learn(recipe(steps=30), shards, tmp_path)
    assert [path.name for path in network.iterdir()] == ["mapping-0000030.png"]
    assert not (curves / "old.tsv").exists()


def test_curves_take_no_longer_the_more_there_is_of_them(shards, tmp_path, quiet, crash, monkeypatch):
    """DVCLive sums up at each `sync`, and for DVC Studio reads what it has written so far."""
    written = []
    monkeypatch.setattr(view.Live, "post_data_to_studio", lambda live: written.append("all of it"))
    monkeypatch.setattr(view.Live, "sync", lambda live, sync=view.Live.sync: written.append(live.step) or sync(live))
    crash(80)
    with pytest.raises(Crash):
        learn(recipe(), shards, tmp_path)
    crash(None)
    learn(recipe(), shards, tmp_path)
    assert written == [1, 25, 50, 75, 75, 75, 85, 85]  # a run sums up at its end besides, and a resumed one at its beginning


def test_what_else_is_in_its_folders_stays(shards, tmp_path, quiet, crash):
    names = ["network/figure.png", "checkpoints/thesis.safetensors", "checkpoints/notes/a"]
    names += [f"training/{name}" for name in ("log.csv", "params.yaml", "dvc.yaml", "report.md", "report.html", "plots/images/a.png")]
    mine = [tmp_path / name for name in names]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    crash(80)
    with pytest.raises(Crash):
        learn(recipe(), shards, tmp_path)
    crash(None)
    learn(recipe(), shards, tmp_path)
    learn(recipe(steps=30), shards, tmp_path)
    assert {file.read_text() for file in mine} == {"mine"}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["notes", "thesis.safetensors"]


def stopped(settings, shards, folder, crash, at=60):
    crash(at)
    with pytest.raises(Crash):
        learn(settings, shards, folder)
    return crash(None)


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"steps": 60}, {"seed": 5}])
def test_a_changed_parameter_starts_afresh(shards, tmp_path, quiet, crash, change):
    stopped(recipe(), shards, tmp_path, crash)
    done = crash(30)
    with pytest.raises(Crash):
        learn(recipe(**change), shards, tmp_path)
    assert done == list(range(30))
    left = sorted((tmp_path / "checkpoints").iterdir())
    assert len(left) == 2 and left[1] == left[0].with_suffix(".safetensors")  # drawings and state; the other recipe's are gone
    crash(None)
    learn(recipe(**change), shards, tmp_path)
    assert done[0] == 25 and not (tmp_path / "checkpoints").exists()


def test_a_run_that_fails_at_once_costs_another_none_of_its_work(shards, tmp_path, quiet, crash):
    crash(None)
    unbroken = learn(recipe(), shards, tmp_path / "unbroken")
    done = stopped(recipe(), shards, tmp_path / "a", crash)
    with pytest.raises(TrainingError, match=r"between steps 0 and 1; bring model\.input_scale and the weights of the loss \(train\.con"):
        learn(recipe(weight_decay=1e38), shards, tmp_path / "a")
    assert not (tmp_path / "a" / "gae.safetensors").exists()
    done.clear()
    assert learn(recipe(), shards, tmp_path / "a") == unbroken and done[0] == 50


def test_a_changed_model_starts_afresh(shards, tmp_path, quiet, crash):
    done = stopped(recipe(), shards, tmp_path, crash)
    learn(recipe().model_copy(update={"model": params.Model(n_factors=16, n_hidden=8, n_maps=7, context=3, dilation=2)}), shards, tmp_path)
    assert done[0] == 0


def test_what_changes_no_result_goes_on(shards, tmp_path, quiet, crash):
    crash(None)
    unbroken = learn(recipe(), shards, tmp_path / "unbroken")
    done = stopped(recipe(), shards, tmp_path / "a", crash)
    settings = recipe().model_copy(update={"plot": params.Plot(interval=7), "compute": params.Compute(checkpoint_seconds=60)})
    assert learn(settings, shards, tmp_path / "a") == unbroken and done[0] == 50


@pytest.mark.parametrize("change", ["frames", "dtype", "code", "gain", "bins"])
def test_changed_data_start_afresh(shards, tmp_path, quiet, crash, change):
    frames = [[tiny.music(120 + 20 * line, line)] for line in range(N_LINES)]
    done = stopped(recipe(), shards, tmp_path, crash)
    how = {}
    if change == "frames":
        frames[3] = [tiny.music(180, 77)]
    elif change == "dtype":
        how = {"dtype": "float16"}
    elif change == "code":
        how = {"code": "c" * 64}
    elif change == "gain":
        how = {"cqt": tiny.CQT.model_copy(update={"gain": 20.0})}
    else:
        frames = [[view[:, :24] for view in line] for line in frames]
        how = {"cqt": tiny.CQT.model_copy(update={"n_bins": 24})}
    tiny.write_shards(tmp_path / "others", frames, **how)
    learn(recipe(), tmp_path / "others", tmp_path)
    assert done[0] == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-9],
        lambda content: content.replace(b'"gae"', b'"goe"'),
        lambda content: content.replace(b'"model.filters_x"', b'"model.filters_z"'),
        lambda content: content.replace(b'\\"step\\"', b'\\"stop\\"'),
        lambda content: content[:-1] + bytes([content[-1] ^ 64]),
    ],
)
def test_a_damaged_checkpoint_costs_a_fresh_start(shards, tmp_path, quiet, crash, capsys, damage):
    crash(None)
    unbroken = learn(recipe(), shards, tmp_path / "unbroken")
    done = stopped(recipe(), shards, tmp_path / "a", crash)
    (file,) = (tmp_path / "a" / "checkpoints").glob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    (file.parent / f".{file.name}.77.partial").write_text("half")
    (file.parent / f"{16 * '0a'}.safetensors").write_text("of another recipe")
    capsys.readouterr()
    assert learn(recipe(), shards, tmp_path / "a") == unbroken and done[0] == 0
    assert f"warning: {file}: damaged; training starts again from the first step\n" in capsys.readouterr().err


def test_a_checkpoint_that_can_not_be_opened_stays(shards, tmp_path, quiet, crash, monkeypatch):
    """Rights, or a server that does not answer, may come back; the steps would not."""

    def closed(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    stopped(recipe(), shards, tmp_path, crash)
    (file,) = (tmp_path / "checkpoints").glob("*.safetensors")
    before = file.read_bytes()
    monkeypatch.setattr("gae.checkpoints.open", closed, raising=False)
    with pytest.raises(GaeError, match=f"^{file}: Permission denied; make room or check the permissions, then run it again$"):
        learn(recipe(), shards, tmp_path)
    assert file.read_bytes() == before


def test_checkpoints_come_at_their_time(shards, tmp_path, quiet, crash, monkeypatch):
    clock = iter(range(0, 100_000, 10))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    saved = []
    monkeypatch.setattr(module.Checkpoints, "save", lambda store, **facts: saved.append(facts["step"]))
    learn(recipe(steps=250).model_copy(update={"compute": params.Compute(checkpoint_seconds=35)}), shards, tmp_path)
    assert 2 < len(saved) < 6 and all(step % 25 == 0 for step in saved)


def test_memory_is_given_back_at_every_pause(shards, tmp_path, quiet, monkeypatch):
    steps, given_back = [], []
    update = Run.update
    monkeypatch.setattr(Run, "update", lambda run, batch: (update(run, batch), steps.append(run.step)))
    monkeypatch.setattr(module, "give_back_memory", lambda: given_back.append(steps[-1]))  # without, holes grow by megabytes a minute
    learn(recipe(), shards, tmp_path)
    assert given_back == [1, 25, 50, 75]


def watch_average(monkeypatch):
    """Records the moving average after every step."""
    update, averages = Run.update, {}

    def watched(run, batch):
        update(run, batch)
        averages[run.step] = {name: tensor.clone().numpy() for name, tensor in run.average.state_dict().items()}

    monkeypatch.setattr(Run, "update", watched)
    return averages


def break_at(monkeypatch, step, value):
    forward, calls = module.Objective.forward, []

    def broken(objective, *sides):
        calls.append(1)
        terms = forward(objective, *sides)
        return {**terms, "loss": terms["loss"] * (value if len(calls) > step else 1.0)}

    monkeypatch.setattr(module.Objective, "forward", broken)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_with_the_last_good_weights(shards, tmp_path, quiet, monkeypatch, value):
    averages = watch_average(monkeypatch)
    break_at(monkeypatch, 60, value)
    with pytest.raises(TrainingError) as caught:
        learn(recipe(), shards, tmp_path)
    message = str(caught.value)
    assert message.splitlines() == [message] and "between steps 50 and 75" in message
    assert str(tmp_path / "gae.safetensors") in message and "lower train.learning_rate" in message
    model = load_model(tmp_path / "gae.safetensors")
    assert all(np.array_equal(model.weights[name], averages[50][name]) for name in model.weights)
    assert model.facts["step"] == model.facts["metrics"]["step"] == 50
    assert not (tmp_path / "metrics.json").exists()


def test_after_a_resume_the_last_good_weights_are_those_of_the_checkpoint(shards, tmp_path, quiet, crash, monkeypatch):
    stopped(recipe(), shards, tmp_path, crash)
    averages = watch_average(monkeypatch)
    break_at(monkeypatch, 3, math.nan)
    with pytest.raises(TrainingError, match="between steps 50 and 75"):
        learn(recipe(), shards, tmp_path)
    weights = load_model(tmp_path / "gae.safetensors").weights
    assert not any(np.array_equal(weights[name], averages[51][name]) for name in weights)
    assert all(np.abs(weights[name] - averages[51][name]).max() < 0.05 for name in weights)


def test_an_absurd_rate_stops_the_run_with_the_last_good_weights(shards, tmp_path, quiet, monkeypatch):
    averages = watch_average(monkeypatch)
    # absurd from step 180 on: from the start it might calm down before a rise counts
    monkeypatch.setattr(module, "schedule", lambda step, train: 1.0 if step >= 180 else 1e-3)
    absurd = {"learning_rate": 1.0, "optimiser": "adam", "objective": "reconstruction", "filter_norm": 2.0}
    with pytest.raises(TrainingError, match=r"the loss diverges: .* at step 200, .* at the start; weights from before"):
        learn(recipe(**absurd, steps=2000), shards, tmp_path)
    steps, losses = np.loadtxt(tmp_path / "training/plots/metrics/loss.tsv", skiprows=1).T
    good = int(steps[losses <= 3 * losses[0]][-1])
    weights = load_model(tmp_path / "gae.safetensors").weights
    assert good == 175 and all(np.array_equal(weights[name], averages[good][name]) for name in weights)


def scores(monkeypatch, values):
    values = iter(values)
    monkeypatch.setattr(module, "VALIDATION_STEPS", 25)
    monkeypatch.setattr(Validation, "score", lambda validation, model: (next(values), 0.05))


def test_patience_ends_the_run_and_the_best_weights_are_kept(shards, tmp_path, quiet, monkeypatch):
    scores(monkeypatch, [0.2, 0.5, 0.4, 0.6, 0.6, 0.1, 0.3])
    averages = watch_average(monkeypatch)
    learn(recipe(patience=3, steps=1000), shards, tmp_path)
    metrics, model = read_json(tmp_path / "metrics.json"), load_model(tmp_path / "gae.safetensors")
    assert (metrics["step"], metrics["steps"]) == (125, 175) and max(averages) == 175
    assert all(np.array_equal(model.weights[name], averages[125][name]) for name in model.weights)


@pytest.mark.parametrize(("validation", "why"), [(0, "train.validation is 0"), (0.5, "the training list has too few lines")])
def test_patience_without_validation_is_warned_of(shards, tmp_path, quiet, capsys, monkeypatch, validation, why):
    monkeypatch.setattr(module, "split", lambda lines, share: (lines, []))
    learn(recipe(patience=1, steps=50, validation=validation), shards, tmp_path)
    assert f"train.patience does nothing, as no track is held out for validation: {why}" in capsys.readouterr().err


def test_without_patience_all_steps_are_done_and_the_best_weights_are_kept(shards, tmp_path, quiet, monkeypatch):
    scores(monkeypatch, [0.2, 0.5, 0.4, 0.3])
    averages = watch_average(monkeypatch)
    learn(recipe(), shards, tmp_path)
    model = load_model(tmp_path / "gae.safetensors")
    assert max(averages) == STEPS and model.facts["step"] == 50
    assert all(np.array_equal(model.weights[name], averages[50][name]) for name in model.weights)


def test_the_newest_weights_within_a_standard_error_of_the_best_are_kept(shards, tmp_path, quiet, monkeypatch):
    scores(monkeypatch, [0.2, 0.5, 0.46, 0.3])
    averages = watch_average(monkeypatch)
    learn(recipe(), shards, tmp_path)
    model = load_model(tmp_path / "gae.safetensors")
    assert model.facts["step"] == 75
    assert all(np.array_equal(model.weights[name], averages[75][name]) for name in model.weights)


def test_patience_is_not_forgotten_by_a_stopped_run(shards, tmp_path, quiet, crash, monkeypatch):
    """Scores are made to follow from the weights, so that runs can be compared."""
    monkeypatch.setattr(module, "VALIDATION_STEPS", 25)
    monkeypatch.setattr(Validation, "score", lambda validation, model: (model.map_1.weight.sum().item() * 1e3 % 1 / 2, 0.02))
    settings = recipe(patience=3, steps=1000)
    crash(None)
    unbroken = learn(settings, shards, tmp_path / "unbroken")
    ended = read_json(tmp_path / "unbroken/metrics.json")
    assert 75 < ended["steps"] < 1000
    done = stopped(settings, shards, tmp_path / "a", crash, ended["steps"] - 1)
    with monkeypatch.context() as failing:
        failing.setattr(module, "save_model", fail)
        with pytest.raises(Crash):  # when all is done and nothing written
            learn(settings, shards, tmp_path / "a")
    done.clear()
    assert learn(settings, shards, tmp_path / "a") == unbroken and done == list(range(ended["steps"] - 25, ended["steps"]))
    after = read_json(tmp_path / "a/metrics.json")
    assert (after["step"], after["steps"]) == (ended["step"], ended["steps"])


def test_without_validation_the_newest_average_is_kept(shards, tmp_path, quiet, monkeypatch):
    averages = watch_average(monkeypatch)
    learn(recipe(validation=0), shards, tmp_path)
    weights = load_model(tmp_path / "gae.safetensors").weights
    assert all(np.array_equal(weights[name], averages[STEPS][name]) for name in weights)
    assert "validation_top1" not in read_json(tmp_path / "metrics.json")


@pytest.mark.parametrize("averaging", [0.0, 0.5, 0.999])
def test_the_average_follows_the_formula(shards, tmp_path, quiet, monkeypatch, averaging):
    update, expected = Run.update, {}

    def watched(run, batch):
        before = {name: tensor.double() for name, tensor in run.average.state_dict().items()}
        step = run.step
        update(run, batch)
        keep = min(averaging, (1 + step) / (10 + step))
        for name, tensor in run.model.state_dict().items():
            expected[name] = keep * before[name] + (1 - keep) * tensor
            assert torch.allclose(run.average.state_dict()[name].double(), expected[name], atol=1e-6)

    monkeypatch.setattr(Run, "update", watched)
    learn(recipe(averaging=averaging, steps=30), shards, tmp_path)
    assert expected


def test_filters_keep_their_norm(shards, tmp_path, quiet):
    learn(recipe(filter_norm=0.3, averaging=0), shards, tmp_path)
    weights = load_model(tmp_path / "gae.safetensors").weights
    for name in ("filters_x", "filters_y"):
        assert np.allclose(np.linalg.norm(weights[name].reshape(16, -1), axis=1), 0.3, atol=1e-5)


def test_the_schedule_is_one_cycle():
    settings = params.Train(steps=1000, warmup=0.1)
    rates = [schedule(step, settings) for step in range(1000)]
    assert rates[0] == pytest.approx(0.04) and max(rates) == rates[100] == 1 and rates[550] == pytest.approx(0.5)
    assert all(a < b for a, b in zip(rates[:100], rates[1:101], strict=True)) and 0 < rates[-1] < 1e-3
    assert all(a > b for a, b in zip(rates[100:900], rates[101:901], strict=True))
    assert {schedule(step, params.Train(schedule="constant")) for step in (0, 50, 3999)} == {1.0}
    assert all(0 < schedule(0, params.Train(steps=steps)) <= 1 for steps in (1, 2, 10))


def test_the_weight_of_the_contrast_falls_to_a_share():
    settings = params.Train(steps=1000, contrast=0.2, contrast_kept=0.25)
    assert [contrast_weight(step, settings) for step in (0, 500, 1000)] == pytest.approx([0.2, 0.1, 0.05])
    assert contrast_weight(999, params.Train(steps=1000, contrast=0.2, contrast_kept=1)) == 0.2
    assert contrast_weight(7, params.Train(contrast=0)) == 0


@pytest.mark.parametrize("kept", [1.0, 0.01])
def test_the_last_loss_has_the_last_weight(shards, tmp_path, quiet, monkeypatch, kept):
    monkeypatch.setattr(module, "PAUSE_STEPS", 1)
    settings = recipe(contrast_kept=kept)
    learn(settings, shards, tmp_path)
    last = read_json(tmp_path / "metrics.json")
    weight = contrast_weight(STEPS - 1, settings.train)
    assert last["loss"] - last["reconstruction"] == pytest.approx(weight * last["contrast"], rel=1e-2)


@pytest.fixture
def measured(monkeypatch):
    """Changes what is measured: each step's terms become `change(step, terms)`."""
    update = Run.update

    def measured(change):
        def changed(run, batch):
            update(run, batch)
            run._window[-1] = change(run.step, run._window[-1])

        monkeypatch.setattr(Run, "update", changed)

    return measured


def scaled(terms, factor):
    return {name: factor * value for name, value in terms.items()}


def test_a_loss_diverges_beside_the_first_at_the_same_weight(shards, tmp_path, quiet, measured):
    """A loss that stays far below the first because the contrast faded: what is left of it has risen fivefold."""
    measured(lambda step, terms: scaled(terms, 5 if step > 250 else 1))
    settings = recipe(contrast=10, contrast_kept=1e-3, steps=1000)
    with pytest.raises(TrainingError, match=r"the loss diverges: .* at step 275, .* at the start"):
        learn(settings, shards, tmp_path)
    losses = np.loadtxt(tmp_path / "training/plots/metrics/loss.tsv", skiprows=1)[:, 1]
    assert losses[-1] < losses[0]


def test_a_first_loss_by_chance_small_is_no_measure(shards, tmp_path, quiet, measured):
    """Such as that of a batch of rests."""
    measured(lambda step, terms: scaled(terms, 0.01 if step == 1 else 1))
    learn(recipe(steps=300), shards, tmp_path)


def test_nor_is_it_once_the_contrast_has_fallen(shards, tmp_path, quiet, measured):
    """What is then left of the loss is the reconstruction, of which a batch of rests had none."""
    rests = {"loss": torch.tensor(20.0), "contrast": torch.tensor(5.0), "reconstruction": torch.tensor(0.0)}
    measured(lambda step, terms: rests if step == 1 else terms)
    learn(recipe(steps=300, contrast=4, contrast_kept=1e-3), shards, tmp_path)


@pytest.fixture
def rising(measured):
    """Makes the loss rise soon after the start."""
    measured(lambda step, terms: scaled(terms, 100 if step > 50 else 1))


def test_a_loss_that_rises_soon_after_the_start_diverges(shards, tmp_path, quiet, rising):
    with pytest.raises(TrainingError, match="the loss diverges"):
        learn(recipe(steps=300), shards, tmp_path)


def test_a_training_too_short_for_a_rise_to_pass_is_no_success(shards, tmp_path, quiet, measured):
    measured(lambda step, terms: scaled(terms, 20 if step > 25 else 1))
    with pytest.raises(TrainingError, match=r"the loss diverges: .* at step 60, .* at the start; weights from before"):
        learn(recipe(steps=60), shards, tmp_path)
    assert load_model(tmp_path / "gae.safetensors").facts["step"] == 25


@pytest.mark.parametrize("objective", ["invariance", "reconstruction"])
@pytest.mark.parametrize(("factor", "until", "stopped"), [(1000, 25, 25), (20, 1000, 200)])
def test_a_loss_that_rises_within_the_first_steps_diverges(shards, tmp_path, quiet, measured, objective, factor, until, stopped):
    """What has risen by the second look is no measure of what follows, even if it falls again."""
    measured(lambda step, terms: scaled(terms, factor if 1 < step <= until else 1))
    with pytest.raises(TrainingError, match=rf"the loss diverges: .* at step {stopped}, .* at the start; weights from before"):
        learn(recipe(steps=300, objective=objective), shards, tmp_path)
    assert load_model(tmp_path / "gae.safetensors").facts["step"] == 1


def test_the_last_good_weights_outlast_another_try(shards, tmp_path, quiet, rising):
    found = []
    for _ in range(2):
        (tmp_path / "metrics.json").write_text("of another training")
        with pytest.raises(TrainingError, match="the loss diverges"):
            learn(recipe(steps=300), shards, tmp_path)
        assert not (tmp_path / "metrics.json").exists()
        found.append((tmp_path / "gae.safetensors").read_bytes())
    assert found[0] == found[1] and load_model(tmp_path / "gae.safetensors").facts["step"] == 50


@pytest.mark.parametrize(
    ("place", "name"), [(module.Objective, "forward"), (module.GatedAutoencoder, "__init__"), (module.Muon, "step"), (Run, "validate")]
)
def test_a_training_too_large_for_memory_says_what_to_lower(shards, tmp_path, quiet, monkeypatch, place, name):
    def full(*_):
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(place, name, full)
    with pytest.raises(TrainingError, match=r"lower train\.batch \(4\) or train\.contrast_frames \(24\), or the sizes of model"):
        learn(recipe(), shards, tmp_path)


@pytest.mark.parametrize(
    "said", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]
)
def test_a_gpu_that_others_fill_is_one_line(said):
    with pytest.raises(TrainingError, match="memory does not hold this training"), within_memory(params.Train()):
        raise RuntimeError(said)


class FakeTrack:
    n_frames = 100

    def __init__(self, key):
        self.key = key


def lines_of(*keys):
    return [[FakeTrack(key) for key in line.split()] for line in keys]


def keys_of(lines):
    return {track.key for line in lines for track in line}


@pytest.mark.parametrize(
    ("n", "share", "count"),
    [
        (4, 0.5, 0),
        (5, 0.1, 1),
        (5, 0.2, 1),
        (10, 0.1, 1),
        (15, 0.1, 1),
        (10, 0, 0),
        (20, 0.1, 2),
        (39, 0.1, 3),
        (100, 0.5, 50),
        (3000, 0.5, 1200),
    ],
)
def test_the_split_is_disjoint_and_as_large_as_asked(n, share, count):
    lines = lines_of(*(f"track{number} view{number}" for number in range(n)))
    training, validation = split(lines, share)
    assert len(validation) == count and len(training) == n - count
    assert keys_of(training).isdisjoint(keys_of(validation)) and [line for line in lines if line in training] == training


def test_the_split_is_stable():
    lines = lines_of(*(f"track{number}" for number in range(60)))
    _, validation = split(lines, 0.2)
    assert keys_of(split(lines[::-1], 0.2)[1]) == keys_of(validation)
    _, one_more = split([*lines, *lines_of("another")], 0.2)
    assert len(keys_of(one_more) ^ keys_of(validation)) <= 2


def test_no_content_is_on_both_sides_of_the_split():
    for number in range(20):
        lines = lines_of(*(f"a{n} b{n}" for n in range(10)), f"b{number % 10} c", f"a{number % 10}", f"d b{number % 10}")
        training, validation = split(lines, 0.3)
        assert validation and training and keys_of(training).isdisjoint(keys_of(validation))


def test_no_content_is_validated_on_twice():
    """The frames of two copies would be looked for among each other, of which neither is the nearest."""
    copies = lines_of(*(f"{place}{n} {place}{n}-view" for n in range(10) for place in "aa"))
    training, validation = split(copies, 0.2)
    keys = [track.key for line in validation for track in line]
    assert len(validation) == 4 and len(set(keys)) == len(keys) and len(training) == 12
    shared = lines_of(*(f"piano{n // 2} other{n}" for n in range(20)))
    training, validation = split(shared, 0.2)
    assert len(keys_of(validation)) == 8 and keys_of(training).isdisjoint(keys_of(validation))
    assert keys_of(split(shared[::-1], 0.2)[1]) == keys_of(validation)


def test_lines_that_all_share_a_track_are_all_trained_on():
    lines = lines_of(*(f"take{number} score" for number in range(5)))
    assert split(lines, 0.1) == (lines, [])


def test_training_never_sees_the_tracks_to_validate_on(shards, tmp_path, quiet, monkeypatch):
    seen = []
    init = Run.__init__

    def watched(run, *arguments):
        init(run, *arguments)
        seen.extend([keys_of(run.excerpts.lines), run.validation.windows[0]])

    monkeypatch.setattr(Run, "__init__", watched)
    learn(recipe(steps=1, validation=0.2), shards, tmp_path)
    with Shards(shards) as read:
        training, validation = split(read.lines, 0.2)
        assert seen[0] == keys_of(training) and len(keys_of(validation)) == 2
        frames = {frame.tobytes() for key in keys_of(validation) for frame in read.read(key)}
    assert all(frame.tobytes() in frames for window in seen[1].numpy() for frame in window)


def test_weights_that_broke_find_nothing(shards):
    with Shards(shards) as read:
        model = GatedAutoencoder(read.cqt.n_bins, recipe().model)
        validation = Validation(read, read.lines, recipe().model.reach, 1)
        torch.nn.init.constant_(model.filters_x, math.nan)
        assert validation.score(model)[0] == 0


def test_tracks_too_short_are_neither_trained_nor_validated_on(tmp_path, quiet):
    frames = [[tiny.music(n, n)] for n in [2, 3, 10, 30] * 3]
    tiny.write_shards(tmp_path / "short", frames)
    with pytest.raises(TrainingError, match="no track of the training list has 31 frames"):
        learn(recipe(validation=0.5), tmp_path / "short", tmp_path)
    tiny.write_shards(tmp_path / "some", [*frames, [tiny.music(31, 5)]])
    learn(recipe(validation=0.5, steps=3), tmp_path / "some", tmp_path)


def test_a_compiled_step_learns_the_same(shards, tmp_path, quiet, monkeypatch):
    # traced as ever, in one piece, and differentiated, but run without a compiler, which takes half a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    for choice in (False, True):
        learn(recipe(steps=10, compile=choice), shards, tmp_path / str(choice))
    plain, compiled = (read_json(tmp_path / str(choice) / "metrics.json") for choice in (False, True))
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_what_all_processes_gather_stands_apart_from_what_is_compiled():
    def gathered(tensor, sync_grads):
        if torch.compiler.is_compiling():
            raise NotImplementedError("all_gather is not supported under torch.compile")
        return torch.stack([tensor, tensor])

    graphs = []
    gather = gatherer(SimpleNamespace(world_size=2, all_gather=gathered))
    step = torch.compile(lambda x: (gather(x * 2) + 1).sum(), backend=lambda graph, inputs: graphs.append(graph) or graph)
    assert step(torch.ones(3)) == 18 and len(graphs) == 2


def test_without_a_compiler_one_line_says_so(shards, tmp_path, quiet, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler found\n\nand more")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    with pytest.raises(TrainingError, match=r"^train\.compile: .*No working C\+\+ compiler found; install .* false$"):
        learn(recipe(compile=True), shards, tmp_path)


def test_a_gpu_that_the_compiler_does_not_serve_is_one_line(shards, tmp_path, quiet, monkeypatch):
    def missing(graph, inputs):
        raise TritonMissing(None)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=missing))
    with pytest.raises(TrainingError, match=r"^train\.compile: .*Triton.*; install .* set it to false$"):
        learn(recipe(compile=True), shards, tmp_path)


def test_other_failures_of_a_compiled_step_are_not_blamed_on_the_compiler(shards, tmp_path, quiet, monkeypatch):
    def full(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "compile", lambda objective: objective)
    monkeypatch.setattr(module.Objective, "forward", full)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        learn(recipe(compile=True), shards, tmp_path)


def test_a_device_that_is_not_there_is_one_line(shards, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(TrainingError, match=r"^train\.accelerator cuda, train\.devices 1, train\.nodes 1: .*not available"):
        learn(recipe(accelerator="cuda"), shards, tmp_path)


def test_a_job_of_slurm_with_other_hosts_than_asked_for_is_one_line(shards, tmp_path, monkeypatch):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    ranks = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    job = {"SLURM_JOB_NAME": "gae", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "MASTER_ADDR": "localhost", **ranks}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=r"^train\.accelerator cpu.*, train\.nodes 2: .*`--nodes=1` does not match") as caught:
        learn(recipe(nodes=2), shards, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("objective", "precision"), [("invariance", "bf16"), ("invariance", "fp32"), ("reconstruction", "fp32")])
def test_a_step_elsewhere_brings_nothing_of_the_processors(shards, monkeypatch, objective, precision):
    """Tensors of the meta device stand for a GPU's: whatever meets one of the processor's raises."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and asked(kind))  # which it does not know
    settings = recipe(objective=objective, precision=precision, sparsity=1e-5, weight_decay=1e-5)
    with Shards(shards) as frames:
        excerpts = Excerpts(frames, frames.lines, settings.model.lags, settings.train)
        batch = [torch.from_numpy(array).to("meta") for array in next(excerpts.batches(0, 1))]
    model = GatedAutoencoder(tiny.CQT.n_bins, settings.model).to("meta")
    module.Objective(model, settings.train)(*batch, 0.3)["loss"].backward()
    for optimiser in module.optimisers_of(model, settings.train):
        optimiser.step()
    model.set_filter_norm(settings.train.filter_norm)
    x, y = batch[0][0], batch[0][0][:, settings.model.reach :]
    assert model.reconstruct(model.mapping(x[:, :-1], y), x[:, :-1]).device.type == "meta"
    assert all(weight.grad.device.type == "meta" for weight in model.parameters())


@pytest.mark.parametrize(("precision", "kind"), [("bf16", torch.optim.Muon), ("fp32", module.Muon)])
def test_muon_is_pytorchs_where_it_is_quick(precision, kind):
    settings = recipe(precision=precision)
    model = GatedAutoencoder(tiny.CQT.n_bins, settings.model)
    biases, matrices = module.optimisers_of(model, settings.train)
    assert type(biases) is torch.optim.Adam and type(matrices) is kind
    (group,) = matrices.param_groups
    assert group.get("weight_decay", 0) == 0 and group["initial_lr"] == settings.train.muon_rate
    assert {weight.ndim for weight in group["params"]} == {2}


def test_validation_knows_invariant_features_from_others(tmp_path):
    class Fake:
        filters_x = torch.zeros(1)

        def __init__(self, mapping):
            self.mapping = mapping

    def intervals(x, y):
        """Where the tones are drops out of a spectrum's magnitude, and their distances stay."""
        return torch.fft.rfft(torch.cat([x, y], dim=1), n=2 * y.shape[-1], dim=-1).abs().flatten(1)[:, None]

    lines = [[np.pad(tiny.frames(3000, seed, 20), ((0, 0), (8, 8)))] for seed in range(3)]
    tiny.write_shards(tmp_path / "shards", lines)
    with Shards(tmp_path / "shards") as read:
        validation = Validation(read, read.lines, 3, seed=1)
        assert len(validation.windows[0]) == 1200
        assert validation.score(Fake(intervals))[0] > 0.8 and validation.score(Fake(lambda x, y: y))[0] < 0.1
        assert validation.score(Fake(intervals)) == Validation(read, read.lines, 3, seed=1).score(Fake(intervals))
        assert Validation(read, [], 3, seed=1).score(Fake(intervals)) is None


@pytest.mark.parametrize("lengths", [(4,), (8,), (300,), (4, 300, 3000)])
def test_validation_asks_for_no_frame_twice(tmp_path, monkeypatch, lengths):
    class Perfect:
        filters_x = torch.zeros(1)

        def mapping(self, x, y):
            return torch.cat([x, y], dim=1).flatten(1)[:, None]

    monkeypatch.setattr(module, "transpose", lambda frames, shift: frames)
    tiny.write_shards(tmp_path, [[tiny.frames(length, seed, 36)] for seed, length in enumerate(lengths)])
    with Shards(tmp_path) as read:
        validation = Validation(read, read.lines, 3, seed=1)
        assert validation.counts == [min(length - 3, 1200 // len(lengths)) for length in lengths]
        assert validation.score(Perfect())[0] == 1


@pytest.mark.parametrize(("bins_per_octave", "shifts"), [(5, {-2, -1, 1, 2}), (12, {*range(-6, 0), *range(1, 7)})])
def test_validation_always_transposes(tmp_path, monkeypatch, bins_per_octave, shifts):
    seen = []
    monkeypatch.setattr(module, "transpose", lambda frames, shift: seen.append(shift) or frames)
    cqt = params.Cqt(**{**tiny.CQT.model_dump(), "bins_per_octave": bins_per_octave, "n_bins": 16})
    tiny.write_shards(tmp_path, [[tiny.frames(50, seed, 16)] for seed in range(100)], cqt=cqt)
    with Shards(tmp_path) as read:
        Validation(read, read.lines, 3, seed=1)
    assert set(seen) == shifts


def test_lines_too_short_to_train_on_are_told(tmp_path, quiet, capsys):
    tiny.write_shards(tmp_path / "shards", [[tiny.music(length, seed)] for seed, length in enumerate((100, 20, 100, 10))])
    learn(recipe(steps=2), tmp_path / "shards", tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(said) == 1 and "2 of 4 lines of the training list are shorter than 1.0 s" in said[0]


def test_a_list_without_tracks_is_refused(tmp_path, quiet):
    write_json(tmp_path / "shards" / "index.json", {"lines": []})
    with pytest.raises(TrainingError, match="no track of the training list"):
        learn(recipe(), tmp_path / "shards", tmp_path)


def test_training_learns(tmp_path, quiet, monkeypatch):
    """A minute of tunes: the losses fall, and frames are found again when they are transposed."""
    monkeypatch.setattr(module, "VALIDATION_STEPS", 25)
    score, scored = Validation.score, []
    monkeypatch.setattr(Validation, "score", lambda *arguments: scored.append(score(*arguments)) or scored[-1])
    tiny.write_shards(tmp_path / "shards", [[tiny.music(400, seed)] for seed in range(12)])
    settings = recipe(steps=400, batch=8, shift=6, learning_rate=5e-3, dropout=0.0, stride=1, validation=0.2)
    wide = params.Model(n_factors=32, n_hidden=16, n_maps=16, context=3, dilation=2)
    learn(settings.model_copy(update={"model": wide}), tmp_path / "shards", tmp_path)
    curves = {
        name: np.loadtxt(tmp_path / f"training/plots/metrics/{name}.tsv", skiprows=1)[:, 1]
        for name in ("loss", "contrast", "reconstruction", "validation_top1")
    }
    assert curves["loss"][-1] < 0.6 * curves["loss"][0]
    assert curves["contrast"][-1] < 0.6 * curves["contrast"][0] and curves["reconstruction"][-1] < 0.8
    assert curves["validation_top1"].max() > 3 * curves["validation_top1"][0] + 0.1
    model = load_model(tmp_path / "gae.safetensors")
    scores, errors = np.transpose(scored)
    assert scores == pytest.approx(curves["validation_top1"]) and all(errors[scores > 0] > 0)
    best = np.array([np.argmax(scores[: n + 1]) for n in range(len(scores))])
    as_good = np.flatnonzero(scores >= scores[best] - errors[best])
    assert model.facts["step"] == 25 * (1 + as_good[-1])


# Real processes


def run_in_process(settings, shards, folder):
    """The body of a process that is to be killed."""
    pictures.draw_network = draw_nothing
    torch.set_num_threads(1)
    train(params.validate(settings), shards, **places(folder))


@pytest.fixture(scope="module")
def forkserver():
    """Where processes come from for which PyTorch is imported once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gae.train"])
    return context


@pytest.fixture(scope="module")
def processes(forkserver):
    """Starts a training of its own."""

    def start(settings, shards, folder):
        process = forkserver.Process(target=run_in_process, args=(settings.model_dump(), shards, folder))
        process.start()
        return process

    return start


def run_together(settings, shards, folder, rank, port, change):
    """The body of one process of several, as torchrun would start it."""
    world = settings["train"]["devices"]
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    change()
    try:
        run_in_process(settings, shards, folder)
    except (GaeError, OSError) as error:
        (folder / f"said-by-{rank}").write_text(explained(error))
        raise SystemExit(1) from None


def said(folder):
    """By rank, what the processes said at their end."""
    return {int(file.name.split("-")[-1]): file.read_text() for file in folder.glob("said-by-*")}


def unchanged():
    """As it is."""


def ended_at_40():
    """Before step 40 the process ends."""
    update = Run.update
    Run.update = lambda run, batch: os._exit(9) if run.step == 40 else update(run, batch)


def spoilt():
    """From step 40 on the loss is no number."""
    update = Run._differentiate

    def differentiate(run, batch):
        return update(run, batch._replace(y=batch.y * np.float32(np.nan if run.step >= 40 else 1)))

    Run._differentiate = differentiate


def full():
    """At step 50 the disk is full."""
    save = Checkpoints.save

    def fail(store, step, **facts):
        if step >= 50 and store.fabric.is_global_zero:
            raise OSError(28, "No space left on device", str(store.file))
        save(store, step=step, **facts)

    Checkpoints.save = fail


def of_other_code():
    """The second process has other code."""
    if os.environ["RANK"] == "1":
        module.code_digest = lambda modules, packages: "0" * 64


def without_shards():
    """The second process finds no frames."""
    if os.environ["RANK"] == "1":

        def missing(folder):
            raise FormatError(f"{folder}: no such folder")

        module.Shards = missing


@pytest.fixture(scope="module")
def together(forkserver):
    """Runs all processes of a training; their exit codes."""

    def run(settings, shards, folder, change=unchanged):
        folder.mkdir(exist_ok=True)
        port, values = free_port(), settings.model_dump()
        ranks = range(settings.train.devices)
        processes = [forkserver.Process(target=run_together, args=(values, shards, folder, rank, port, change)) for rank in ranks]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            process.kill()  # if it waits for another in vain
            process.join()
        return [process.exitcode for process in processes]

    return run


def saves(folder):
    """Which checkpoint there is."""
    try:
        (file,) = (folder / "checkpoints").glob("*.safetensors")
        return file.stat().st_ino
    except (OSError, ValueError):
        return None


def test_killed_processes_end_where_an_unbroken_one_ends(shards, tmp_path, processes):
    settings = recipe(steps=300, precision="bf16", dtype="float16")
    unbroken = processes(settings, shards, tmp_path / "unbroken")
    unbroken.join()
    assert unbroken.exitcode == 0
    rng, killed = np.random.default_rng(0), tmp_path / "killed"
    for _ in range(4):
        process, before = processes(settings, shards, killed), saves(killed)
        while saves(killed) in (None, before) and process.is_alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
    final = processes(settings, shards, killed)
    final.join()
    assert final.exitcode == 0
    assert outcome(killed) == outcome(tmp_path / "unbroken")
    assert not (killed / "checkpoints").exists() and not list(killed.rglob(".*"))


def test_two_processes_contrast_as_one_where_each_frame_of_an_excerpt_has_a_group(shards, tmp_path, quiet, together):
    changes = {"contrast_frames": 4, "steps": 40, "averaging": 0.0}
    learn(recipe(**changes), shards, tmp_path / "one")
    assert together(few_drawings(recipe(**changes, devices=2)), shards, tmp_path / "two") == [0, 0]
    one, two = (load_model(tmp_path / name / "gae.safetensors").weights for name in ("one", "two"))
    for name, weights in one.items():
        assert np.abs(weights - two[name]).max() < 1e-5, name


def test_three_processes_go_on_where_they_were_and_end_as_unbroken(shards, tmp_path, together):
    """Of three numbers the sum depends on their order."""
    settings = few_drawings(recipe(steps=60, batch=6, devices=3))
    assert together(settings, shards, tmp_path / "stopped", ended_at_40) == [9, 9, 9] and saves(tmp_path / "stopped")
    for folder in ("stopped", "unbroken"):
        assert together(settings, shards, tmp_path / folder) == [0, 0, 0]
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "unbroken")


def test_what_all_processes_come_upon_the_first_tells(shards, tmp_path, together):
    assert together(few_drawings(recipe(devices=2, block=900)), shards, tmp_path) == [1, 0]
    assert said(tmp_path).keys() == {0} and said(tmp_path)[0].startswith("no track of the training list has")
    assert together(few_drawings(recipe(devices=2)), shards, tmp_path, spoilt) == [1, 0]
    assert said(tmp_path).keys() == {0} and said(tmp_path)[0].startswith("the loss became NaN or infinite between steps 25 and 50; weights")
    assert load_model(tmp_path / "gae.safetensors").facts["step"] == 25


def test_processes_that_would_train_by_other_recipes_do_not_begin(shards, tmp_path, together):
    assert together(few_drawings(recipe(devices=2)), shards, tmp_path, of_other_code) == [1, 0]
    assert said(tmp_path)[0].startswith("1 of the 2 processes have other parameters, frames, code or packages than the first; give all")
    assert not (tmp_path / "gae.safetensors").exists()


def test_a_process_whose_peer_does_not_begin_says_so_in_one_line(shards, tmp_path, together):
    assert together(few_drawings(recipe(devices=2)), shards, tmp_path, without_shards) == [1, 1]
    assert said(tmp_path)[1].endswith("no such folder")
    assert said(tmp_path)[0].startswith("another process of this training has ended or does not answer (") and "\n" not in said(tmp_path)[0]


def test_a_process_whose_peer_has_ended_says_so_in_one_line(shards, tmp_path, together):
    """As where a disk is full, or memory."""
    assert together(few_drawings(recipe(devices=2)), shards, tmp_path, full) == [1, 1]
    assert said(tmp_path)[0].endswith("No space left on device; make room or check the permissions, then run it again")
    (line,) = said(tmp_path)[1].splitlines()
    assert line.startswith("another process of this training has ended or does not answer (")
    assert line.endswith("; see what it says, and run it again to go on")


def test_a_second_run_beside_the_first_is_refused(shards, tmp_path, processes):
    settings = few_drawings(recipe(steps=300))
    first = processes(settings, shards, tmp_path)
    while saves(tmp_path) is None and first.is_alive():
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = subprocess.run(command(settings, shards, tmp_path), env=ENVIRONMENT, capture_output=True, text=True)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert first.exitcode == 0
    assert second.returncode == 1 and second.stderr.count("\n") == 1
    assert second.stderr.startswith(f"train.py: error: {tmp_path / 'checkpoints'}: another run")


def command(settings, shards, folder, launcher=(sys.executable,)):
    """The stage's command line."""
    write_json(folder / "params.json", settings.model_dump())
    line = [*launcher, ROOT / "stages" / "train.py", "--params", folder / "params.json", "--shards", shards]
    for option, path in zip(("model", "metrics", "curves", "drawings", "checkpoints"), places(folder).values(), strict=True):
        line += [f"--{option}", path]
    return [str(word) for word in line]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def few_drawings(settings):
    return settings.model_copy(update={"plot": params.Plot(interval=10_000, dpi=30, filters=1)})


def test_a_killed_stage_goes_on(shards, tmp_path, processes):
    settings = few_drawings(recipe(steps=300))
    unbroken = processes(settings, shards, tmp_path / "unbroken")
    stage = subprocess.Popen(command(settings, shards, tmp_path / "stage"), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while saves(tmp_path / "stage") is None and stage.poll() is None:
        time.sleep(0.002)
    stage.kill()
    assert stage.wait() == -signal.SIGKILL
    done = subprocess.run(command(settings, shards, tmp_path / "stage"), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == ""
    lines = done.stderr.replace("\r", "\n").split("\n")
    assert all(line.startswith("train: ") or not line for line in lines), done.stderr  # the progress bar, nothing else
    unbroken.join()
    assert outcome(tmp_path / "stage") == outcome(tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("launcher", "objective", "optimiser", "tolerance"),
    [
        ("fabric", "reconstruction", "adam", 2e-6),
        ("torchrun", "invariance", "muon", 1e-5),  # Muon's steps are ten times as long
        ("hosts", "invariance", "muon", 1e-5),
    ],
)
def test_two_processes_get_the_weights_of_one(shards, tmp_path, quiet, monkeypatch, launcher, objective, optimiser, tolerance):
    monkeypatch.setattr(module, "_VALIDATION_FRAMES", VALIDATION_FRAMES)  # as in processes that are started
    changes = {"optimiser": optimiser, "objective": objective, "sparsity": 1e-3, "weight_decay": 1e-4, "steps": 40, "averaging": 0.0}
    learn(recipe(**changes), shards, tmp_path / "one")
    settings = few_drawings(recipe(**changes, **({"nodes": 2} if launcher == "hosts" else {"devices": 2})))
    launch = (sys.executable,)
    if launcher == "torchrun":
        launch = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    (tmp_path / "two").mkdir()
    line = command(settings, shards, tmp_path / "two", launch)
    environment = {**ENVIRONMENT, "MASTER_PORT": str(free_port())}
    second = subprocess.Popen(line, env={**environment, "NODE_RANK": "1"}) if launcher == "hosts" else None
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert second is None or second.wait(60) == 0
    assert (done.stderr.count("waiting at 127.0.0.1:") == 1) == (launcher != "fabric")
    assert done.stderr.count("train:   0%") == 1 and "deprecated" not in done.stderr and "Precision" not in done.stderr
    one, two = (load_model(tmp_path / name / "gae.safetensors") for name in ("one", "two"))
    for name, weights in one.weights.items():
        assert np.abs(weights - two.weights[name]).max() < tolerance, name
    assert json.dumps(one.facts["train"]) == json.dumps(two.facts["train"])
    assert two.facts["metrics"] == pytest.approx(one.facts["metrics"], rel=1e-5)


def test_validation_looks_for_frames_of_the_first_view_in_the_last(tmp_path, monkeypatch):
    """At all places that all views have, be it a single one."""
    monkeypatch.setattr(module, "transpose", lambda frames, shift: frames)
    lines = [[tiny.frames(n, n) for n in (60, 40, 20)], [tiny.frames(4)]]
    tiny.write_shards(tmp_path, lines)
    with Shards(tmp_path) as read:
        queries, candidates = (windows.numpy()[:-1] for windows in Validation(read, read.lines, 3, seed=1).windows)
    (first, _, last), places = lines[0], set()
    for query, candidate in zip(queries, candidates, strict=True):
        (place,) = [n for n in range(60 - 3) if np.array_equal(first[n : n + 4], query)]
        assert np.array_equal(last[place : place + 4], candidate)
        places.add(place)
    assert places == set(range(20 - 3))


def test_the_error_of_a_validation_is_over_its_tracks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "invariance_top1", lambda queries, candidates: np.arange(len(queries)) < len(queries) / 2)
    network = GatedAutoencoder(tiny.CQT.n_bins, recipe().model)
    tiny.write_shards(tmp_path, [[tiny.frames(60, seed)] for seed in range(2)])
    with Shards(tmp_path) as read:
        assert Validation(read, read.lines, network.sizes.reach, seed=1).score(network) == (0.5, pytest.approx(0.5))


@pytest.mark.parametrize(("found", "kept"), [([(1.0, 0.0)] * 4, 85), ([(0.2, 0.3), (0.5, 0.01), (0.4, 0.3), (0.3, 0.3)], 50)])
def test_the_error_that_counts_is_that_of_the_best_and_may_be_none(shards, tmp_path, quiet, monkeypatch, found, kept):
    """As where all frames are found."""
    found = iter(found)
    monkeypatch.setattr(module, "VALIDATION_STEPS", 25)
    monkeypatch.setattr(Validation, "score", lambda validation, model: next(found))
    learn(recipe(), shards, tmp_path)
    assert load_model(tmp_path / "gae.safetensors").facts["step"] == kept


@pytest.mark.parametrize("optimiser", ["muon", "adam"])
def test_all_rates_follow_the_schedule(shards, tmp_path, quiet, monkeypatch, optimiser):
    update, rates = Run.update, []

    def watched(run, batch):
        update(run, batch)
        rates.append([group["lr"] for optimiser in run.optimisers for group in optimiser.param_groups])

    monkeypatch.setattr(Run, "update", watched)
    settings = recipe(steps=6, optimiser=optimiser, learning_rate=3e-3, muon_rate=0.02)
    learn(settings, shards, tmp_path)
    peaks = [3e-3, 0.02] if optimiser == "muon" else [3e-3]
    assert np.allclose(rates, [[schedule(step, settings.train) * peak for peak in peaks] for step in range(6)], rtol=1e-6)


def test_changed_code_starts_afresh(shards, tmp_path, quiet, crash, monkeypatch):
    done = stopped(recipe(), shards, tmp_path, crash)
    monkeypatch.setattr(module, "code_digest", lambda modules, packages: "0" * 64)
    learn(recipe(), shards, tmp_path)
    assert done[0] == 0


def test_the_speed_is_that_of_all_runs(shards, tmp_path, quiet, crash, monkeypatch):
    with monkeypatch.context() as slow:
        slow.setattr(Run, "elapsed", lambda run: 1000.0)
        stopped(recipe(), shards, tmp_path, crash)
    learn(recipe(), shards, tmp_path)
    assert read_json(tmp_path / "metrics.json")["frames_per_second"] == 4  # 85 steps, each of 4 excerpts of 12 frames


def test_where_it_runs_is_no_part_of_a_recipe():
    settings = recipe().train
    for change in ({"accelerator": "cuda"}, {"devices": 2}, {"nodes": 2}):
        assert module.recipe_of(settings.model_copy(update=change)) == module.recipe_of(settings)
    assert module.recipe_of(settings.model_copy(update={"precision": "bf16"})) != module.recipe_of(settings)
