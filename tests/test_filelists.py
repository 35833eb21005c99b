import os
import re
import tracemalloc
from contextlib import chdir
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gae import filelists
from gae.errors import ListError
from gae.filelists import check_list, read_list

FILES = [
    "a.wav",
    "b.wav",
    "music/one.wav",
    "music/two.flac",
    "music/deep/three.wav",
    "music/.hidden.wav",
    "views/p1.piano.ogg",
    "views/p2.piano.ogg",
    "views/p1.organ.ogg",
    "views/p2.organ.ogg",
    "live [2019].wav",
    "live 2.wav",
    "Sonata in C # minor.wav",
    "C#.wav",
    "#1 hit.wav",
    "Für Élise – 音.wav",
    "a?.wav",
    " padded.wav",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with chdir(folder):
        yield folder


@pytest.fixture
def read(folder):
    def read(text):
        (folder / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_list("list.txt")

    return read


@pytest.fixture
def paths(read):
    return lambda text: [line.paths for line in read(text)]


@pytest.fixture
def refuse(read):
    """The message with which a list is refused: one line that names the list and the line."""

    def refuse(text, number=1):
        with pytest.raises(ListError) as caught:
            read(text)
        message = str(caught.value)
        assert message.startswith(f"list.txt, line {number}: ") and message.splitlines() == [message]
        return message

    return refuse


def test_a_line_is_a_path(read, folder):
    lines = read(f"b.wav\n{folder}/a.wav\nmusic/one.wav")
    assert [line.paths for line in lines] == [("b.wav",), (f"{folder}/a.wav",), ("music/one.wav",)]
    assert [line.number for line in lines] == [1, 2, 3]


@pytest.mark.parametrize("text", ["", "\n", " \t \n\n", "# only\n  # comments\n\t# here", "\ufeff"])
def test_nothing_is_listed(paths, text):
    assert paths(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "# music\n\na.wav\n\n   \nb.wav\n",
        "a.wav\r\n\r\nb.wav\r\n",
        "\ufeffa.wav\nb.wav",
        "\ufeff# music\na.wav\nb.wav",
        "  a.wav  \n\tb.wav\t\n",
        "a.wav # the first\nb.wav\t# the second",
        "a.wav    #the first\nb.wav # one # more",
    ],
)
def test_comments_blanks_and_line_ends_do_not_matter(paths, text):
    assert paths(text) == [("a.wav",), ("b.wav",)]


@pytest.mark.parametrize(
    "name", ["live [2019].wav", "Sonata in C # minor.wav", "C#.wav", "./#1 hit.wav", "Für Élise – 音.wav", "a?.wav", "./ padded.wav"]
)
@pytest.mark.parametrize("comment", ["", " # a comment", " # one # more", "\t# a comment", "\t# with\ttabs"])
def test_a_name_that_exists_is_taken_literally(paths, name, comment):
    assert paths(name + comment) == [(name,)]


def test_a_number_sign_starts_a_comment_at_the_beginning(paths):
    assert paths("#1 hit.wav") == []


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("*.wav", ["#1 hit.wav", " padded.wav", "C#.wav", "Für Élise – 音.wav", "Sonata in C # minor.wav"] + ["a.wav", "a?.wav", "b.wav"] + ["live 2.wav", "live [2019].wav"]),
        ("[ab].wav", ["a.wav", "b.wav"]),
        ("?.wav", ["a.wav", "b.wav"]),
        ("music/*", ["music/one.wav", "music/two.flac"]),
        ("music/**/*.wav", ["music/deep/three.wav", "music/one.wav"]),
        ("*/*.piano.ogg # two", ["views/p1.piano.ogg", "views/p2.piano.ogg"]),
    ],
)  # fmt: skip
def test_globs_expand_in_sorted_order_to_files(paths, pattern, files):
    assert paths(pattern) == [(file,) for file in sorted(files)]


def test_globs_do_not_go_round_in_circles(tmp_path, monkeypatch):
    """Links that lead back up, two of which would give a path for each order of going round; links to elsewhere are followed."""
    monkeypatch.chdir(tmp_path)
    for name in ("music/a.wav", "music/deep/b.wav", "music/.hidden/c.wav", "elsewhere/d.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "music" / "latest").symlink_to(".")
    (tmp_path / "music" / "deep" / "up").symlink_to("../..")
    (tmp_path / "music" / "more").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../music")
    found = ["music/a.wav", "music/deep/b.wav", "music/more/d.wav"]
    for start, root in [("", tmp_path), ("", tmp_path / "music"), (f"{tmp_path}/", tmp_path)]:
        monkeypatch.chdir(root)
        (tmp_path / "list.txt").write_text(f"{start}{'' if root.name == 'music' else 'music/'}**/*.wav\n")
        paths = [os.path.relpath(line.paths[0], tmp_path) for line in read_list(tmp_path / "list.txt")]
        assert paths == found if start or root == tmp_path else [os.path.relpath(root / path, tmp_path) for path in paths]
    monkeypatch.chdir(tmp_path / "music")
    (tmp_path / "list.txt").write_text("**\n")
    assert [line.paths[0] for line in read_list(tmp_path / "list.txt")] == ["a.wav", "deep/b.wav", "more/d.wav"]


@pytest.mark.parametrize("pattern", ["live [2019]/*.wav", "live [2019]/one.wav", "live [2019]/**/*.wav # all of it", "live [[]2019]/*.wav"])
def test_signs_in_the_names_of_folders_are_taken_literally(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    for name in ("live [2019]/one.wav", "live 2/other.wav", "Suite #1/a.wav", "Suite #1/b.wav"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    Path("list.txt").write_text(f"{pattern}\nSuite #1/*.wav # both\n{tmp_path}/Suite #1/a.wav\tSuite #1/c.wav")
    with pytest.raises(ListError, match=r"^list\.txt, line 3: no such file: Suite #1/c\.wav; "):
        read_list("list.txt")
    Path("Suite #1/c.wav").touch()
    assert [line.paths for line in read_list("list.txt")] == [
        ("live [2019]/one.wav",),
        *[(f"Suite #1/{name}.wav",) for name in "abc"],
        (f"{tmp_path}/Suite #1/a.wav", "Suite #1/c.wav"),
    ]


def test_a_home_folder_expands(paths, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert paths("~/Sonata in C # minor.wav # mine") == [(f"{folder}/Sonata in C # minor.wav",)]


def test_views_are_separated_by_tabs(read):
    lines = read("# two\nviews/p1.piano.ogg\tviews/p1.organ.ogg\n\na.wav\t\tb.wav \t live 2.wav # three")
    assert [(line.paths, line.number) for line in lines] == [
        (("views/p1.piano.ogg", "views/p1.organ.ogg"), 2),
        (("a.wav", "b.wav", "live 2.wav"), 4),
    ]


def test_globs_of_views_are_paired(read):
    lines = read("\nviews/*.piano.ogg\tviews/*.organ.ogg")
    assert [(line.paths, line.number) for line in lines] == [
        (("views/p1.piano.ogg", "views/p1.organ.ogg"), 2),
        (("views/p2.piano.ogg", "views/p2.organ.ogg"), 2),
    ]


@pytest.fixture
def views(tmp_path, monkeypatch):
    """The pairs that a line gives, of files of these names."""
    monkeypatch.chdir(tmp_path)

    def views(line, *names):
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()
        Path("list.txt").write_text(line)
        return [line.paths for line in read_list("list.txt")]

    return views


@pytest.mark.parametrize(
    ("line", "pairs"),
    [
        ("v/*_piano.wav\tv/*_organ.wav", ["v/s_p2_piano.wav v/s_p2_organ.wav", "v/s_piano.wav v/s_organ.wav"]),
        ("*/piano/**/?.wav\t*/organ/**/?.wav", ["r/piano/d/e/1.wav r/organ/d/e/1.wav", "r/piano/d/1.wav r/organ/d/1.wav"]),
        ("[ab]1*.wav\tx/[ab]1*.flac", ["a1 b.wav x/a1 b.flac", "b1.wav x/b1.flac"]),
        ("piano/*\torgan/*", ["piano/1 piano.wav organ/1 organ.wav", "piano/2 piano.wav organ/2 organ.wav"]),
        ("piano/*\torgan/?.wav", ["piano/1.wav organ/1.wav", "piano/2.wav organ/2.wav"]),
        ("piano//*.wav\torgan///*_s.wav", ["piano/1.wav organ/1_s.wav", "piano/10.wav organ/10_s.wav", "piano/2.wav organ/2_s.wav"]),
        ("v//piano/*.wav\tv/organ/*.wav", ["v/piano/1.wav v/organ/1.wav", "v/piano/2.wav v/organ/2.wav"]),
        ("p [x]/*.wav\to [x]/*.wav", ["p [x]/1-b.wav o [x]/1-b.wav", "p [x]/1.wav o [x]/1.wav"]),
    ],
)
def test_files_are_paired_by_what_wildcards_stand_for(views, line, pairs):
    pairs = [tuple(re.findall(r"[^.]*\.\w+(?: |$)", pair)) for pair in pairs]
    pairs = [(one.strip(), other.strip()) for one, other in pairs]
    assert sorted(views(line, *[name for pair in pairs for name in pair])) == sorted(pairs)


def test_a_file_without_a_partner_is_refused(views):
    with pytest.raises(ListError, match=r"^list\.txt, line 1: b/piano\.wav has no partner of its name among the views; "):
        views("*/piano.wav\t*/organ.wav", "a/piano.wav", "a/organ.wav", "b/piano.wav", "c/organ.wav")


def test_unequal_views_are_refused(refuse):
    assert "[2, 1]" in refuse("\nviews/*.piano.ogg\tviews/p1.organ.ogg", 2)


def test_what_is_listed_twice_is_used_once(read, capsys):
    lines = read("a.wav\n*.wav\na.wav\na.wav\tb.wav")
    assert [line.paths for line in lines].count(("a.wav",)) == 1 and len(lines) == 11
    assert lines[-1].paths == ("a.wav", "b.wav")
    warnings = capsys.readouterr().err.splitlines()
    assert [warning.split(": ")[1] for warning in warnings] == ["list.txt, line 2", "list.txt, line 3"]


@pytest.mark.parametrize(
    ("text", "number", "words"),
    [
        ("a.wav\n\nmissing.wav", 3, "no such file: missing.wav"),
        ("# one\r\n\r\nmissing.wav\r\n", 3, "missing.wav"),
        ("a.wav\tmissing.wav", 1, "missing.wav"),
        ("missing.wav # a.wav", 1, "no such file: missing.wav;"),
        ("*.mp3", 1, "no file matches *.mp3"),
        ("music", 1, "is a folder; write music/*"),
        ("music/deep/", 1, "is a folder"),
        ("music/de*", 1, "no file matches"),
        ("a\0.wav", 1, "zero byte"),
        ("a.wav b.wav", 1, "no such file: a.wav b.wav"),
        ("x" * 5000, 1, "no such file"),
    ],
)
def test_what_names_no_file_is_refused_with_its_line(refuse, text, number, words):
    assert words in refuse(text, number)


@pytest.mark.parametrize("name", [b"latin-\xe4.wav", b"two\nlines.wav"])
def test_a_name_that_no_list_could_hold_is_refused(refuse, folder, name):
    (folder / "odd").mkdir(exist_ok=True)
    path = os.fsencode(folder / "odd") + b"/" + name
    open(path, "w").close()
    try:
        assert "rename" in refuse("a.wav\nodd/*", 2)
    finally:
        os.unlink(path)


@pytest.mark.parametrize("name", ["missing.txt", "music"])
def test_no_list_is_refused(folder, name):
    with pytest.raises(ListError, match=f"^{name}: no such list; write one audio path a line"):
        read_list(name)


@pytest.mark.parametrize("text", [b"\xff\xfea\0", "Für Elise.wav".encode("latin-1"), b"RIFF\x90\xd0"])
def test_what_is_no_text_is_refused(read, text):
    with pytest.raises(ListError, match=r"^list\.txt: not UTF-8 text"):
        read(text)


@pytest.mark.parametrize("text", ["~\0", "a.wav # \0", "~\0/a.wav"])
def test_a_zero_byte_anywhere_is_refused(refuse, text):
    assert "zero byte" in refuse(text)


def test_a_list_that_no_file_can_be(folder):
    with pytest.raises(ListError, match=r"^a\\x00b: no file can be called so"):
        read_list("a\0b")


def test_globs_that_would_never_end(refuse, paths, folder):
    """Each of these walked the same folders millions of times."""
    (folder / "/".join("abcdefghijkl")).mkdir(parents=True)
    (folder / "a/b/c/end.wav").touch()
    assert "after a wildcard" in refuse("*/../" * 30 + "*.wav")
    assert "after a wildcard" in refuse("music/[d]eep/..")
    assert paths("**/" * 30 + "end.wav") == paths("**/end.wav") == [("a/b/c/end.wav",)]
    assert paths("music/../*/one.wav") == [("music/../music/one.wav",)]


def test_a_line_of_number_signs_takes_no_memory(refuse):
    text = "missing.wav" + " #" * 100_000
    tracemalloc.start()
    try:
        assert "no such file: missing.wav;" in refuse(text)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


pieces = st.sampled_from(
    [*FILES, "\t", "\n", "\r\n", "#", " # ", "*", "[", "]", "**", "?", "\0", "~", "\x0b", "\x85", "\u2028", "views/*.ogg"]
)


@given(st.lists(pieces | st.text(max_size=4), max_size=8).map("".join))
def test_any_text_gives_files_or_one_line(folder, text):
    if "/" in text.replace("music/", "").replace("views/", ""):
        return  # not beyond the folder
    (folder / "list.txt").write_text(text, encoding="utf-8", newline="")
    try:
        for line in read_list("list.txt"):
            assert line.paths and all(os.path.isfile(path) for path in line.paths) and 1 <= line.number <= len(text.splitlines())
    except ListError as error:
        assert len(str(error).splitlines()) == 1 and "list.txt, line " in str(error)


def test_only_what_is_to_come_may_be_missing(folder):
    (folder / "early.txt").write_text("made/*/1.flac\tmade/*/2.flac\n\nmusic/one.wav  # is there\n")
    check_list("early.txt", "made")
    with pytest.raises(ListError, match=r"early\.txt, line 1: no file matches made/\*/1\.flac"):
        read_list("early.txt")
    (folder / "early.txt").write_text(f"{folder}/made/*/1.flac\nviews/*.piano.ogg\tviews/p1.organ.ogg")
    with pytest.raises(ListError, match=r"early\.txt, line 2: its views expand to \[2, 1\] files"):
        check_list("early.txt", "made")
    (folder / "early.txt").write_text("made/*/1.flac\nmusic/three.wav\n")
    with pytest.raises(ListError, match=r"early\.txt, line 2: no such file: music/three\.wav"):
        check_list("early.txt", "made")


def test_folders_that_link_to_each_other_are_walked_once(tmp_path, monkeypatch):
    """Each path from one to another would else be a way of its own: 20 folders, more than could ever be walked."""
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / f"music/{number:02}" for number in range(20)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / f"{folder.name}.wav").touch()
    for folder in folders:
        for other in folders:
            if other != folder:
                (folder / f"to{other.name}").symlink_to(other)
    (tmp_path / "list.txt").write_text("music/**/*.wav\n")
    found = [line.paths[0] for line in read_list(tmp_path / "list.txt")]
    assert sorted(os.path.basename(path) for path in found) == [f"{number:02}.wav" for number in range(20)]


def test_many_stars_are_told_apart_in_little_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        for number in (1, 2):
            (tmp_path / folder / f"{'a' * 100}b{'a' * 100}{number}.wav").touch()
    stars = "*a" * 12
    (tmp_path / "list.txt").write_text(f"x/{stars}*b*.wav\ty/{stars}*b*.wav\n")
    assert [[os.path.basename(path)[-5] for path in line.paths] for line in read_list(tmp_path / "list.txt")] == [["1", "1"], ["2", "2"]]


def test_a_comment_behind_a_web_address_is_not_asked_for(monkeypatch):
    """A server may answer 403 to what is not there."""
    asked = []
    monkeypatch.setattr("gae.filelists.kind", lambda path: asked.append(path) or "file")
    assert filelists._columns("https://example.org/a.flac  # the first") == ["https://example.org/a.flac"] and asked == []


def test_one_file_in_two_spellings_is_used_once(paths, capsys):
    assert paths("a.wav\n./a.wav\nmusic/../a.wav\n") == [("a.wav",)]
    assert capsys.readouterr().err.count("is listed before; used once") == 2


def test_views_that_spaces_set_apart_get_a_hint(refuse):
    assert "or separate views by a tab" in refuse("a.wav    b.wav")


def test_what_is_to_come_excuses_no_other_view(folder):
    (folder / "early.txt").write_text("made/*/1.flac\tmusic/three.wav\n")
    with pytest.raises(ListError, match=r"early\.txt, line 1: no such file: music/three\.wav"):
        check_list("early.txt", "made")


@pytest.mark.parametrize("glob", ["data/*/1.flac", "data/**/1.flac", "*/made/1.flac", "data/mad?/*/1.flac"])
def test_a_wildcard_may_stand_for_a_folder_that_is_to_come(tmp_path, monkeypatch, glob):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "early.txt").write_text(f"{glob}\n")
    check_list("early.txt", "data/made")
    (tmp_path / "data/made").mkdir()  # it has come, and not the files
    with pytest.raises(ListError, match=r"early\.txt, line 1: no file matches"):
        check_list("early.txt", "data/made")


def test_what_is_to_come_excuses_no_wildcard_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/other").mkdir(parents=True)
    for glob in ("data/other/*/1.flac", "*.flac"):
        (tmp_path / "early.txt").write_text(f"{glob}\n")
        with pytest.raises(ListError, match=r"early\.txt, line 1: no file matches"):
            check_list("early.txt", "data/made")


def test_what_is_to_come_may_lie_in_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "early.txt").write_text("~/made/*/1.flac\n")
    check_list("early.txt", folder / "made")


@pytest.mark.parametrize("text", ["a.wav # one\tb.wav # two", "a.wav # one\tb.wav\t#two"])
def test_a_comment_ends_with_its_line(paths, text):
    assert paths(text) == [("a.wav",)]


@pytest.mark.parametrize("space", [" ", "   ", " \t "])
def test_a_glob_may_have_a_comment(paths, space):
    assert paths(f"music/*{space}# all") == [("music/one.wav",), ("music/two.flac",)]
