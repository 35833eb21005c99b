import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gae import params
from gae.commandline import stage
from gae.errors import ParamsError
from gae.params import Params

ROOT = Path(__file__).parents[1]
KEYS = [(section, key) for section, field in Params.model_fields.items() for key in field.annotation.model_fields]


@pytest.fixture
def load(tmp_path):
    def load(text, overrides=()):
        path = tmp_path / "params.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return params.load(path, overrides)

    return load


@pytest.fixture
def refuse(load):
    """The message with which a text is refused: one line of reasonable length that names the file."""

    def refuse(text, overrides=()):
        with pytest.raises(ParamsError) as caught:
            load(text, overrides)
        message = str(caught.value)
        assert message.splitlines() == [message] and len(message) < 2000
        return message

    return refuse


def test_the_defaults_of_the_schema_are_those_of_params_yaml():
    assert params.load(ROOT / "params.yaml") == Params()


def test_params_yaml_shows_every_key():
    assert [(section, key) for section, keys in yaml.safe_load((ROOT / "params.yaml").read_text()).items() for key in keys] == KEYS


@pytest.mark.parametrize("text", ["", "model:\n", "{}", "model: {}"])
def test_what_is_left_out_has_its_default(load, text):
    assert load(text) == Params()


def test_what_is_read_cannot_be_changed(load):
    with pytest.raises(ValueError, match="frozen"):
        load("").model.n_maps = 3


@pytest.mark.parametrize(
    ("text", "key", "allowed"),
    [
        ("model: {n_maps: wide}", "model.n_maps", "an integer >= 1"),
        ("model: {n_maps: '64'}", "model.n_maps", "an integer >= 1"),
        ("model: {n_maps: 64.0}", "model.n_maps", "an integer >= 1"),
        ("model: {n_maps: true}", "model.n_maps", "an integer >= 1"),
        ("model: {n_maps: 0}", "model.n_maps", ">= 1"),
        ("model: {n_maps: null}", "model.n_maps", "an integer"),
        ("model: {input_scale: true}", "model.input_scale", "a number > 0"),
        ("model: {input_scale: .nan}", "model.input_scale", "a number > 0"),
        ("model: {input_scale: .inf}", "model.input_scale", "a number > 0"),
        ("model: {context: 8}", "model.context", "odd"),
        ("train: {dropout: 1.0}", "train.dropout", "< 1"),
        ("train: {objective: best}", "train.objective", "invariance or reconstruction"),
        ("train: {seed: 99999999999999999999}", "train.seed", "< 4294967296"),
        ("data: {train_list: 3}", "data.train_list", "a text"),
        ("data: {train_list: ''}", "data.train_list", "length >= 1"),
        ("compute: {scheduler: nonsense}", "compute.scheduler", "of the form"),
        ("compute: {staging: 's3://'}", "compute.staging", "s3://bucket/staging"),
        ("compute: {staging: 's3://bucket/a[1]'}", "compute.staging", "wildcards"),
        ('compute: {staging: "a\\0b"}', "compute.staging", "write a path"),
        ("corpus: {hours: 0.0001}", "corpus.hours", ">= 0.001"),
        ("cqt: {gain: 1.0e-9}", "cqt.gain", ">= 0.01"),
        ("cqt: {fmin: 0}", "cqt.fmin", "a number >= 1"),
        ("cqt: {fmin: 400}", "cqt.fmin", "below half of cqt.sample_rate, 11025 Hz"),
        ("cqt: {fmin: 1.0, bins_per_octave: 240}", "cqt.fmin", "up to 1048576; raise the first or lower the others"),
        ("cqt: {n_bins: 210}", "cqt.fmin", "below half of cqt.sample_rate"),
        ("cqt: {n_bins: 2000, bins_per_octave: 1}", "cqt.fmin", "below half of cqt.sample_rate"),
        (
            "{train: {block: 9}, model: {context: 9, dilation: 2, growth: 0.1}}",
            "train.block",
            "more than the 20 frames that model.context 9 with model.dilation 2 and model.growth 0.1 reaches back",
        ),
        ("{model: {context: 255, growth: 0}, train: {block: 200}}", "train.block", "more than the 255 frames"),
        ("{model: {context: 101, dilation: 5, growth: 0}}", "model.context", "101 frames reach back 701 with model.dilation 5"),
        ("{model: {context: 101, dilation: 4, growth: 0, stretched: 0.4}}", "model.context", "and model.stretched 0.4, allowed: up to 500"),
        ("model: {dilation: 0}", "model.dilation", ">= 1"),
        ("{model: {transposed: 20}, cqt: {n_bins: 20}}", "model.transposed", "fewer than cqt.n_bins (20)"),
        ("train: {batch: 16, devices: 3}", "train.batch", "a multiple of train.devices x train.nodes (3)"),
        ("model: {width: 3}", "model.width", "n_factors, n_hidden, n_maps"),
        ("modle: {n_maps: 3}", "modle", "corpus, data, cqt, model"),
        ("model: {1: 2}", "model.1", "n_factors"),
        ("1: 2", "1", "corpus, data"),
        ("model: 3", "model", "a section with the keys n_factors"),
        ("model: [1]", "model", "a section with the keys n_factors"),
        ("- model", "params.yaml", "must hold sections"),
        ("0", "params.yaml", "must hold sections"),
    ],
)
def test_a_mistake_is_one_line_with_the_dotted_key_and_what_is_allowed(refuse, text, key, allowed):
    message = refuse(text)
    assert f"{key}: " in message and allowed in message


def test_lags_of_the_context():
    def lags(**model):
        return params.Model(**model).lags

    assert lags(context=5, growth=0) == [5, 4, 3, 2, 1]  # the original's: every frame just before y
    assert lags(context=5, dilation=2, growth=0) == [9, 7, 5, 3, 1]
    assert lags(context=5, growth=1) == [11, 7, 4, 2, 1]
    gaps = -np.diff(lags())
    assert len(lags()) == 21 and lags()[-1] == 1 and min(gaps) >= 1 and max(gaps) == gaps[0] == 5


def test_readings_of_the_context():
    def readings(**model):
        return params.Model(context=3, growth=0, dilation=2, **model).readings

    assert readings(transposed=0, stretched=0) == [(0, [5, 3, 1])]
    assert readings(transposed=4, stretched=0) == [(-4, [5, 3, 1]), (0, [5, 3, 1]), (4, [5, 3, 1])]
    assert readings(transposed=4, stretched=0.5) == [(-4, [3, 2, 1]), (0, [5, 3, 1]), (4, [8, 5, 2])]
    assert readings(transposed=0, stretched=1) == [(0, [3, 2, 1]), (0, [5, 3, 1]), (0, [10, 6, 2])]
    assert params.Model(context=3, growth=0, dilation=2, stretched=1).reach == 10
    assert params.Model(context=3, growth=0, dilation=2, stretched=0).reach == 5


def test_the_limits_themselves_are_allowed(load):
    assert load("{train: {block: 10}, model: {context: 9, growth: 0}}").train.block == 10
    assert load("{train: {block: 18}, model: {context: 9, dilation: 2, growth: 0}}").train.block == 18
    assert load("cqt: {sample_rate: 4000, fmin: 1000, n_bins: 11, bins_per_octave: 12}").cqt.n_bins == 11
    with pytest.raises(ParamsError, match=r"cqt\.fmin"):
        load("cqt: {sample_rate: 4000, fmin: 1000, n_bins: 12, bins_per_octave: 12}")


def test_a_key_that_is_merged_and_replaced_stands_once(load):
    read = load("corpus: &c {seed: 3}\nevaluate: &e {<<: *c, frames: 20}\ntrain: {<<: *c, seed: 5}\n")
    assert (read.evaluate.seed, read.train.seed) == (3, 5)


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "1.0e-05", "1e-05", "0.00001"])
def test_numbers_are_read_as_dvc_writes_them(load, number):
    assert load(f"train: {{sparsity: {number}}}").train.sparsity == 1e-5
    assert load("", [f"train.sparsity={number}"]).train.sparsity == 1e-5


def test_an_integer_does_for_a_number(load):
    assert load("train: {sparsity: 1}").train.sparsity == 1


def test_overrides_replace_what_the_file_says(load):
    read = load("model: {n_maps: 3, n_hidden: 5}", ["model.n_maps=128", "cqt.compression=none", "train.dropout=0"])
    assert (read.model.n_maps, read.model.n_hidden, read.cqt.compression, read.train.dropout) == (128, 5, "none", 0)
    assert load("model:", ["model.n_maps=7"]).model.n_maps == 7


def test_an_error_names_what_was_replaced(refuse):
    assert "params.yaml -S model.context=4: model.context: got 4" in refuse("model: {n_maps: 3}", ["model.context=4"])


@pytest.mark.parametrize(
    "override",
    ["model.n_maps", "=3", "model.=3", "n_maps=3", "model.n_maps=[", "model.n_maps=", "model.n_maps=wide", "modle.n_maps=3", "a.b.c=3"],
)
def test_a_mistaken_override_is_one_line(refuse, override):
    assert override.partition("=")[0].rstrip(".").partition(".")[0] in refuse("", [override])


def test_an_override_does_not_hide_a_broken_section(refuse):
    assert "model: got 3" in refuse("model: 3", ["model.n_maps=4"])


@pytest.mark.parametrize(
    "text",
    [
        "model: {n_maps: [",
        "model:\n\t- a: b: c",
        "a: !!python/object/apply:os.system [ls]",
        "a: 2020-13-45",
        "a: !!timestamp x",
        "a: !!bool x",
        "a: " + "9" * 5000,
        "train: {steps: 10}\ntrain: {batch: 2}",
        "train: {steps: 10, steps: 20}",
        "train: {seed: 010}",
        "train: {steps: 1:30}",
        "train: {steps: 1" + ":59" * 4000 + "}",
        "train: {contrast: 1:30.5}",
        "? [a]\n: 2",
        "[" * 20_000,
        b"model: \x00",
        b"\xff\xfe\x00",
        "model: \xe4".encode("latin-1"),
    ],
)
def test_what_is_no_yaml_is_one_line(refuse, text):
    assert "params.yaml: not" in refuse(text)


def test_no_file_is_one_line(tmp_path):
    for path in (tmp_path / "params.yaml", tmp_path):
        with pytest.raises(ParamsError, match="no such file; run from the root"):
            params.load(path)


@pytest.mark.parametrize("section", ["model: *j", "model: {n_maps: *j}", "a: *j"])
def test_a_yaml_bomb_is_neither_expanded_nor_printed(refuse, section):
    names = "abcdefghij"
    laughs = "".join(f"- &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip(names, names[1:], strict=False))
    refuse(f"bomb:\n- &a [ha]\n{laughs}{section}\n")


@pytest.mark.parametrize("merge", ["<<: [{}]", "<<: [{}]\n  <<: [{}]"])
def test_sections_that_merge_each_other_are_not_multiplied(refuse, merge):
    names = "abcdefghijklmnop"
    sections = "".join(
        f"{name}: &{name}\n  " + merge.replace("{}", ", ".join([f"*{before}"] * 9)) + "\n"
        for before, name in zip(names, names[1:], strict=False)
    )
    assert "merges more than 1000 keys" in refuse(f"a: &a {{k: 1}}\n{sections}")
    assert "merges more than 1000 keys" in refuse("a: &a {k: 1}\nb: {<<: [" + ", ".join(["*a"] * 1001) + "]}")


def test_a_merged_section_is_read(load):
    assert load("cqt: &c {fmin: 55.0}\ntrain: {steps: 7}\nmodel: {<<: {n_maps: 3}, context: 5}").model.n_maps == 3


@pytest.mark.parametrize("value", ["0x" + "f" * 5000, "[0x" + "f" * 5000 + "]"])
def test_a_number_too_long_to_print_is_one_line(refuse, value):
    assert "an integer of" in refuse("train: {seed: " + value + "}")


@pytest.mark.parametrize("text", ["model: &m {n_maps: *m}", "model: &m [*m]", "a: &a {b: *a}", "&a [*a]"])
def test_what_holds_itself_is_one_line(refuse, text):
    refuse(text)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["none", "fp32", "skip"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(list(Params.model_fields))
sections = st.dictionaries(
    names, values | st.dictionaries(st.sampled_from(sorted({key for _, key in KEYS})), values, max_size=3), max_size=2
)


def valid_or_one_line(text):
    try:
        read = params._parse(text, "params.yaml")
        assert isinstance(params.validate(read if isinstance(read, dict) else {}), Params)
    except ParamsError as error:
        assert len(str(error).splitlines()) == 1


@given(st.text(max_size=60))
def test_any_text_is_valid_or_one_line(text):
    valid_or_one_line(text)


@given(sections)
def test_any_yaml_is_valid_or_one_line(tree):
    valid_or_one_line(yaml.safe_dump(tree))


@given(st.sampled_from(KEYS), values)
def test_any_value_is_kept_or_refused_by_its_name(key, value):
    section, name = key
    try:
        kept = getattr(getattr(params.validate({section: {name: value}}), section), name)
    except ParamsError as error:
        assert f"{section}." in str(error) or "train.block" in str(error)
    else:
        assert kept == value and type(kept) in (type(value), float) and not (isinstance(kept, float) and math.isinf(kept))


def test_help_tells_every_parameter_of_a_stage():
    lines = params.describe(["cqt", "data.on_error"]).splitlines()
    assert [line.split()[0] for line in lines] == [*(f"cqt.{key}" for key in params.Cqt.model_fields), "data.on_error"]
    assert "cqt.hop_length = 448  time between frames, in samples; an integer >= 1" in lines[1]
    for section, key in KEYS:
        assert params.describe([f"{section}.{key}"]).split(" = ")[1].split(maxsplit=1)[1], f"{section}.{key} has no meaning"


def test_a_stage_prints_what_the_terminal_can_show(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    monkeypatch.setattr(sys, "argv", ["stage"])
    with stage("A stage.", reads=["plot"]):
        print("90.1 ± 2.0", flush=True)
    assert shown.getvalue() == b"90.1 ? 2.0\n"


def test_an_empty_path_is_refused_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stage", "--out", ""])
    with pytest.raises(SystemExit), stage("A stage.", reads=["plot"], out="data/out"):
        raise AssertionError("has begun")
    assert "argument --out: an empty path; write one" in capsys.readouterr().err


def test_an_override_changes_one_section_though_an_alias_makes_them_the_same(tmp_path):
    (tmp_path / "params.yaml").write_text("corpus: &same {seed: 2}\nevaluate: *same\n")
    values = params.load(tmp_path / "params.yaml", ["corpus.seed=5"])
    assert (values.corpus.seed, values.evaluate.seed) == (5, 2)


def test_a_staging_folder_may_lie_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert params.validate({"compute": {"staging": "~/frames"}}).compute.staging == "/home/somebody/frames"


def test_a_stage_whose_output_is_closed_runs(monkeypatch):
    monkeypatch.setattr("sys.argv", ["stage.py"])
    monkeypatch.setattr("sys.stdout", None)
    with stage("Does nothing.", ["corpus"]) as (values, _):
        assert values.corpus
