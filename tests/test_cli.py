import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
from tqdm import tqdm

import gae
from gae.cli import main
from gae.errors import explained
from gae.features import SUFFIXES
from gae.modelfile import SHIPPED, save_model

PLACES = f"{Path(__file__).parents[1]}{os.pathsep}{Path(__file__).parent}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_model(path, tiny.model().network, tiny.CQT)
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("song.wav", "other.flac"):
        soundfile.write(name, tiny.tone(2, 8000), 8000)
    (tmp_path / "bad.wav").write_text("not audio")
    return tmp_path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    captured = capsys.readouterr()
    error = exit.value.code if isinstance(exit.value.code, str) else captured.err
    return exit.value.code, captured.out, error


@pytest.mark.parametrize("name", ["song.h5", "song.npz", "song.csv", "deep/er/song.H5"])
def test_one_file(folder, weights, capsys, name):
    code, _, error = run(capsys, "convert", "song.wav", "--out", name, "--weights", weights)
    assert code == 0 and error == "" and (folder / name).stat().st_size > 1000


def test_features_are_those_of_the_file(folder, weights, capsys):
    run(capsys, "convert", "song.wav", "--out", "song.h5", "--weights", weights)
    expected = gae.extract(*soundfile.read("song.wav", dtype="float32"), weights)
    features = gae.read_features("song.h5")
    assert np.array_equal(features.values, expected.values) and features.origin.source == "song.wav"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_named(folder, capsys, name):
    options = [] if name == "pretrained" else ["--weights", name]
    assert run(capsys, "convert", "song.wav", "--out", "song.h5", *options)[0] == 0
    assert gae.read_features("song.h5").origin.model_sha256 == gae.load_model(name).sha256


def test_several_files_go_to_a_folder_and_bad_ones_are_named(folder, weights, capsys):
    code, _, error = run(capsys, "convert", "song.wav", "bad.wav", "none.wav", "other.flac", "--out", "out", "--weights", weights)
    assert code == 1 and len(error.splitlines()) == 2
    assert "gae: error: bad.wav: not audio" in error and "gae: error: none.wav: cannot be opened" in error
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["other.h5", "song.h5"]


def test_features_of_another_recording_are_not_written_over(folder, weights, capsys):
    (folder / "album").mkdir()
    soundfile.write("album/song.wav", tiny.tone(3, 8000), 8000)
    for _ in range(2):  # its own are
        assert run(capsys, "convert", "song.wav", "--out", "out/", "--weights", weights)[0] == 0
    code, _, error = run(capsys, "convert", "album/song.wav", "other.flac", "--out", "out/", "--weights", weights)
    assert code == 1 and len(error.splitlines()) == 1
    assert "out/song.h5: holds the features of song.wav; remove it, or name another folder for those of album/song.wav" in error
    assert gae.read_features("out/song.h5").origin.source == "song.wav" and (folder / "out" / "other.h5").exists()
    os.rename("song.wav", "album/song.wav")  # the same recording elsewhere
    assert run(capsys, "convert", "album/song.wav", "--out", "out/", "--weights", weights)[0] == 0
    assert gae.read_features("out/song.h5").origin.source == "album/song.wav"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_path_may_be_another_recording(folder, weights, capsys, monkeypatch, suffix):
    """As 01.wav is in every album."""
    arguments = ["convert", "song.wav", "--out", f"{folder}/out/", "--format", suffix, "--weights", weights]
    for _ in range(2):  # its own are
        assert run(capsys, *arguments)[0] == 0
    before = (folder / f"out/song{suffix}").read_bytes()
    (folder / "album").mkdir()
    monkeypatch.chdir(folder / "album")
    soundfile.write("song.wav", tiny.tone(3, 8000), 8000)
    code, _, error = run(capsys, *arguments)
    assert code == 1 and f"song{suffix}: holds the features of another song.wav; remove it" in error and len(error.splitlines()) == 1
    assert (folder / f"out/song{suffix}").read_bytes() == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nor_is_what_else_bears_the_name(folder, weights, capsys, suffix):
    (folder / "out").mkdir()
    (folder / f"out/song{suffix}").write_text("mine")
    code, _, error = run(capsys, "convert", "song.wav", "--out", "out/", "--format", suffix, "--weights", weights)
    assert code == 1 and "holds the features of something else" in error and (folder / f"out/song{suffix}").read_text() == "mine"


def test_the_same_file_twice_is_converted_once(folder, weights, capsys):
    assert run(capsys, "convert", "song.wav", "song.wav", "--out", "song.h5", "--weights", weights)[0] == 0
    assert (folder / "song.h5").exists()


def test_one_file_to_a_folder_in_another_format(folder, weights, capsys):
    assert run(capsys, "convert", "song.wav", "--out", "out/", "--format", ".csv", "--weights", weights)[0] == 0
    assert [path.name for path in (folder / "out").iterdir()] == ["song.csv"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["song.wav", "--out", "song.mat"], "song.mat: features are written as"),
        (["song.wav", "--out", "s3://bucket/song.h5"], "s3://bucket/song.h5: written are files of this machine; name a path"),
        (["-", "--out", "song.h5"], "-: cannot be opened; check the path"),
        (["song.wav", "--out", "out"], "out: neither a feature file (.h5, .npz, .csv) nor a folder; end a folder's name in /"),
        (["song.wav", "other.flac", "--out", "both.h5"], "both.h5: named like one feature file, for 2 in a folder; name a folder"),
        (["song.wav", "other.flac", "--out", "bad.wav"], "bad.wav: a file that is there, for 2 in a folder; name a folder"),
        (["song.wav", "--out", "song.h5", "--weights", "none.safetensors"], "none.safetensors: no such model"),
        (["song.wav", "--out", "song.h5", "--weights", "bad.wav"], "bad.wav: not a model file"),
    ],
)
def test_mistakes_end_in_one_line(folder, capsys, arguments, why):
    code, _, error = run(capsys, "convert", *arguments)
    assert why in error and len(error.splitlines()) == 1 and code != 0
    assert sorted(path.name for path in folder.iterdir()) == ["bad.wav", "other.flac", "song.wav"]


def test_original_weights_need_the_right_names(folder, capsys):
    for arguments, why in [
        (["bad.wav", "--out", "x.h5"], "end the name in .safetensors"),
        (["bad.wav", "--out", "x.safetensors"], "bad.wav: not a weights file"),
        (["none.save", "--out", "x.safetensors"], "none.save: cannot be read"),
    ]:
        _, _, error = run(capsys, "import-weights", *arguments)
        assert why in error and len(error.splitlines()) == 1


def test_version_without_heavy_imports():
    code = "import sys, gae.cli\ntry: gae.cli.main(['--version'])\nfinally: print({'torch', 'numba', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"gae {gae.__version__}", "set()"]


@pytest.mark.parametrize("name", ["a\nb.wav", "a\x1b[2J.wav", "a\u2028b.wav", "latin-\udce4.wav", "x" * 5000 + ".wav"])
def test_a_name_of_any_kind_is_one_line(folder, weights, capsys, name):
    code, _, error = run(capsys, "convert", name, "--out", "song.h5", "--weights", weights)
    assert code == 1 and error == error.splitlines()[0] + "\n" and error.strip().isprintable() and len(error) < 2100
    code, _, error = run(capsys, "convert", "song.wav", "--out", f"{name}.h5", "--weights", f"{name}.safetensors")
    assert error.splitlines() == [error] and error.isprintable() and len(error) < 2100


def test_a_name_need_not_be_utf_8(folder, weights, capsys):
    name = os.fsdecode(b"caf\xe9.wav")
    os.rename("song.wav", name)
    assert run(capsys, "convert", name, "--out", "out/", "--weights", weights)[0] == 0


def test_what_is_no_audio_file_is_named_as_what_it_is(folder, weights, capsys):
    (folder / "music").mkdir()
    (folder / "empty.wav").touch()
    _, _, error = run(capsys, "convert", "music", "empty.wav", "song.wav", "--out", "out/", "--weights", weights)
    assert error.splitlines() == [
        "gae: error: music: a folder; check the path, or name the files in it",
        "gae: error: empty.wav: empty; copy it again",
    ]


def test_what_can_not_be_written_is_said_with_a_remedy(folder, weights, capsys):
    _, _, error = run(capsys, "convert", "song.wav", "--out", "bad.wav/song.h5", "--weights", weights)
    assert error == "gae: error: bad.wav: File exists; remove it or name another\n"
    _, _, error = run(capsys, "convert", "song.wav", "--out", f"{80 * '音'}.h5", "--weights", weights)
    assert error == f"gae: error: {80 * '音'}.h5: File name too long; shorten it\n"
    for opened, remedy in (("bad.wav/../none", "name a folder"), ("none", "check the path"), (".", "name a file")):
        with pytest.raises(OSError) as missing:
            Path(opened).read_bytes()
        assert explained(missing.value).startswith(f"{opened}: ") and explained(missing.value).endswith(f"; {remedy}")


def test_a_bar_shows_no_more_of_a_name_than_a_terminal_takes(folder, weights, capsys, monkeypatch):
    monkeypatch.setattr("gae.convert.tqdm", lambda **given: tqdm(**{**given, "delay": 0}))
    name = "two\n\x1b[31mlines.wav"
    (folder / "song.wav").rename(folder / name)
    _, _, error = run(capsys, "convert", name, "--out", "song.h5", "--weights", weights)
    assert "\x1b" not in error and r"two\n\x1b[31mlines.wav" in error


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_conversion_leaves_nothing_half_written(folder, weights, sent):
    code = """
import signal, time, tiny, gae.cli, gae.mapping

signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background it is ignored

def endless(*arguments):
    yield gae.mapping.extract_frames(tiny.frames(40), tiny.model())
    print("writing", flush=True)
    time.sleep(60)

gae.convert.extract_blocks = endless
gae.cli.main()
"""
    command = [sys.executable, "-c", code, "convert", "song.wav", "--out", "out/song.csv", "--weights", weights]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": PLACES})
    assert process.stdout.readline() == "writing\n"
    process.send_signal(sent)
    assert process.communicate(timeout=60)[1] == "gae: interrupted; files that are written are whole\n"
    assert process.returncode == 1 and not list((folder / "out").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["convert", "a.wav", "--out", ""], ["convert", "", "--out", "a.h5"], ["convert", "a.wav", "--out", "a.h5", "--weights", ""]],
)
def test_an_empty_name_is_refused(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", tiny.tone(1, 8000), 8000)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ("an empty name" in str(ended.value) or "give a path" in str(ended.value)) and [path.name for path in tmp_path.iterdir()] == [
        "a.wav"
    ]


def test_one_file_in_two_spellings_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", tiny.tone(1, 8000), 8000)
    save_model("tiny.safetensors", tiny.model().network, tiny.CQT)
    with pytest.raises(SystemExit):
        main(["convert", "a.wav", "./a.wav", str(tmp_path / "a.wav"), "--out", "features/", "--weights", "tiny.safetensors"])
    assert [path.name for path in Path("features").iterdir()] == ["a.h5"]
