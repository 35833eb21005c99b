"""Benchmarks that call into the stages do so as these are: in short. And the recipes that they vary are those that there are."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gae
from gae import params
from gae.scores import NOTE

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def benchmarks_at_hand(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_what_an_archive_costs(monkeypatch, tmp_path):
    import cost

    monkeypatch.setattr(cost, "TRACK", 4)
    seconds, sizes = cost.measure(0, tmp_path)
    assert min(seconds.values()) > 0 and min(sizes.values()) > 0
    assert len(cost.table(seconds, sizes).splitlines()) == 12


def test_what_the_scores_hold(monkeypatch):
    import catalogue

    notes = np.zeros(2, NOTE)
    notes["onset"], notes["length"], notes["pitch"] = [0, 90], [4, 10], 60
    score = SimpleNamespace(tempo=120, notes=notes)
    monkeypatch.setattr(catalogue, "read_score", lambda piece: score)
    pieces = [SimpleNamespace(kind="mass", tempo=(60, 80)), SimpleNamespace(kind="tune", tempo=(60, 80))]
    assert catalogue.seconds(pieces[0]) == pytest.approx(50, abs=2)
    score.tempo = None
    assert catalogue.seconds(pieces[0]) == pytest.approx(100 * 60 / 70, abs=2)
    score.tempo = 400
    assert catalogue.seconds(pieces[0]) == 0
    rows = catalogue.table([*pieces, *pieces], [210, 0, 150, 36]).splitlines()
    assert "| mass | 2 | 0.10 |" in rows and "| tune | 1 | 0.01 |" in rows and rows[-1] == "| all | 3 | 0.1 |"


def test_every_variation_changes_parameters_that_there_are():
    import ablation

    for base, variations in ablation.RECIPES.values():
        as_it_is = params.load(overrides=base)
        for name, changes in variations.items():
            assert (params.load(overrides=[*base, *changes]) == as_it_is) == (not changes), name


def test_the_shipped_recipe_made_the_shipped_weights():
    import ablation

    recipe, model = params.load(overrides=[*ablation.SHIPPED_RECIPE, "train.steps=20000"]), gae.load_model()
    assert (model.sizes, model.cqt) == (recipe.model, recipe.cqt)
    made = {key: value for key, value in model.facts["train"].items() if key != "precision"}  # auto here
    assert made.items() <= recipe.train.model_dump().items()
    command = re.search(r"dvc exp run -n pretrained .*", (ROOT / "models/pretrained.md").read_text())[0]
    assert set(re.findall(r"-S (\S+)", command)) == {*ablation.SHIPPED_RECIPE, "train.steps=20000"}


def test_figures_on_unseen_music_make_a_table():
    import published

    measure = published.figures(["a", "a", "b"], [[0.5, 0.9], [0.3, 0.9], [0.1, 0.9]])
    results = {"later": {"error": published.figures(["a"], [[0.05401]])}, "first": {"error": measure, "piano": measure}}
    assert published.shown(measure).startswith("30.0 ± ") and published.shown(measure).endswith(" / 90.0 ± 0.0 %")
    assert published.table(results, ["first"]).splitlines() == [
        "|  | piano | error |",
        "| --- | --- | --- |",
        "| first | 30.0 / 90.0 | 30.0 / 90.0 |",
        "| later |  | 5.40 |",
    ]


def test_the_model_card_says_what_was_measured():
    import published

    results = json.loads((ROOT / "docs/unseen-shipped.json").read_text())
    kinds = ["pretrained", "pretrained-fast", "published", "published, compressed", "CQT back", "CQT back, context"]
    measured = [[published.shown(results[kind][column]).removesuffix(" %") for kind in kinds] for column in results["CQT back"]]
    card = [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in (ROOT / "models/pretrained.md").read_text().splitlines()]
    shown = [row for row in card if len(row) == len(kinds) and "±" in row[0]]
    assert sorted(shown) == sorted(measured)


@pytest.mark.parametrize("name", ["pretrained", "hour", "transposed"])
def test_the_docs_say_what_was_measured_on_unseen_music(name):
    import published

    results = json.loads((ROOT / f"docs/unseen-{name}.json").read_text())
    ours = {kind: row for kind, row in results.items() if "error" in row and not kind.startswith("published")}
    docs = (ROOT / "docs/experiments.md").read_text().splitlines()
    assert set(published.table(ours, []).splitlines()) <= set(docs)


def test_files_of_figures_agree_on_the_shipped_weights():
    shipped, means = (json.loads((ROOT / f"docs/unseen-{name}.json").read_text()) for name in ("shipped", "transposed"))
    for name in ("pretrained", "pretrained-fast"):
        assert shipped[name] == means[name]


def test_features_over_other_transpositions_and_tempi_are_named_and_made_by_them():
    import published

    named = {
        name: (model.sizes.transposed, model.sizes.stretched)
        for name, (model, *_) in published.kinds_of(["pretrained"], [0], [0, 0.2]).items()
    }
    assert named["pretrained"] == (10, 0.4)
    assert named["pretrained, 0 bins, stretched 0"] == (0, 0) and named["pretrained, 0 bins, stretched 0.2"] == (0, 0.2)
    assert "pretrained, stretched 0.6" in published.kinds_of(["pretrained"], [], [0.6])
    assert "pretrained, 6 bins" in published.kinds_of(["pretrained"], [6], [])


def test_notes_of_a_chord_are_struck_together():
    import published

    assert published.together(np.array([0, 0.02, 0.035, 0.05, 0.3, 0.33])).tolist() == [0, 0, 0, 0.05, 0.3, 0.3]


def test_the_docs_say_what_was_measured_on_the_built_in_hour():
    import ablation

    docs = (ROOT / "docs/experiments.md").read_text().splitlines()
    for file in ("ablation.json", "ablation-full.json"):
        rows = ablation.table(json.loads((ROOT / "docs" / file).read_text()), ablation.DEFAULT).splitlines()
        assert set(rows) <= set(docs), file
