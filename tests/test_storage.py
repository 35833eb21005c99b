"""Audio and computed frames at URLs: the same results as with files, and every mishap one line that names the URL."""

import errno
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import fsspec
import pytest
import s3fs
import servers
import soundfile
import tiny

from gae import compute as computing
from gae import index as indexing
from gae import params, preprocess, storage
from gae.convert import convert_file, feature_names
from gae.errors import AudioError, FormatError, GaeError, ListError, StorageError
from gae.features import read
from gae.filelists import read_list
from gae.files import content_hash, digest, read_json
from gae.shards import Shards

CQT = {"sample_rate": 8000, "hop_length": 256, "fmin": 110.0, "n_bins": 36, "bins_per_octave": 12}
TRACKS = [f"t{number}" for number in range(10)]


@pytest.fixture(autouse=True)
def forgotten(tmp_path, monkeypatch):
    """Each test has a folder of its own, and storages that nobody has talked to."""
    monkeypatch.chdir(tmp_path)
    storage._file_system.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def music():
    """Four pieces that lie in memory, and below music/."""
    Path("music").mkdir()
    for number, name in enumerate("abcd"):
        sing(name, 200.0 + 10 * number)
    return fsspec.filesystem("memory")


def sing(name, frequency, seconds=1.0):
    soundfile.write(f"music/{name}.wav", tiny.tone(seconds, 8000, frequency), 8000)
    with fsspec.open(f"memory://bucket/{name}.wav", "wb") as file:
        file.write(Path(f"music/{name}.wav").read_bytes())


def lists(train, convert):
    Path("train.txt").write_text("\n".join(train))
    Path("convert.txt").write_text("\n".join(convert))


def values(staging, **compute):
    data = {"train_list": "train.txt", "convert_list": "convert.txt", "shifted_views": 0, "shard_mb": 1}
    return params.validate({"data": data, "cqt": CQT, "compute": {"workers": 2, "staging": staging, **compute}})


def run(staging="staging", out="shards", **compute):
    settings = values(staging, **compute)
    indexing.index(settings, "index.json", "memory.json")
    preprocess.preprocess(settings, Path("index.json"), Path(out))
    return tiny.content(out)


def in_memory(folder="memory://bucket/staging"):
    return [url.removeprefix("memory://") for url in storage.below(folder)]


# ---- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["s3://bucket/a.flac", "memory://a", "https://example.org/a.flac?b", "file:///a"])
def test_what_is_a_url(path):
    assert storage.is_url(path) and not storage.is_url(Path(path))


@pytest.mark.parametrize("path", ["a.flac", "/a", "music/s3:/a", "a b://c", "s3:/a", "://a", ""])
def test_what_is_a_path(path):
    assert not storage.is_url(path)


def test_a_line_may_name_urls(music):
    lists(
        [
            "memory://bucket/a.wav",
            "memory://bucket/b.wav # the second",
            "music/c.wav\tmemory://bucket/c.wav",
            "memory://bucket/[cd].wav",
        ],
        [],
    )
    assert [line.paths for line in read_list("train.txt")] == [
        ("memory://bucket/a.wav",),
        ("memory://bucket/b.wav",),
        ("music/c.wav", "memory://bucket/c.wav"),
        ("memory:///bucket/c.wav",),
        ("memory:///bucket/d.wav",),
    ]


def test_a_url_that_looks_like_a_glob_or_a_comment_is_taken_literally(music):
    for name in ("live [2019].wav", "Sonata in C # minor.wav"):
        music.pipe(f"/bucket/{name}", b"RIFF")
    lists(["memory://bucket/live [2019].wav", "memory://bucket/Sonata in C # minor.wav"], [])
    assert [Path(line.paths[0]).name for line in read_list("train.txt")] == ["live [2019].wav", "Sonata in C # minor.wav"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("memory://bucket/missing.wav", "no such file: memory://bucket/missing.wav"),
        ("memory://nowhere/a.wav", "no such file: memory://nowhere/a.wav"),
        ("memory://bucket/*.mp3", "no file matches memory://bucket/*.mp3"),
        ("memory://bucket", r"memory://bucket is a folder; write memory://bucket/*"),
        ("music/a.wav\tmemory://bucket/missing.wav", "no such file: memory://bucket/missing.wav"),
    ],
)
def test_a_url_that_names_no_file_is_refused_with_its_line(music, line, words):
    lists(["memory://bucket/a.wav", "", line], [])
    with pytest.raises(ListError) as caught:
        read_list("train.txt")
    assert str(caught.value).startswith(f"train.txt, line 3: {words}")


class Hosted(type(fsspec.filesystem("memory"))):
    """A storage whose paths do not hold the host, as that of FTP, and which takes no options but its own, as that of SSH."""

    protocol = "sftp"
    store, pseudo_dirs = {}, [""]

    def __init__(self, host=None, **options):
        assert host == "host" and not options
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("sftp://host").strip("/")

    @staticmethod
    def _get_kwargs_from_urls(url):
        return {"host": url.removeprefix("sftp://").split("/")[0]}


def test_paths_without_a_host_are_given_it_back(music, monkeypatch):
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "sftp", Hosted)
    for name in "ab":
        with fsspec.open(f"sftp://host/music/{name}.wav", "wb") as file:
            file.write(Path(f"music/{name}.wav").read_bytes())
    urls = [f"sftp://host/music/{name}.wav" for name in "ab"]
    lists(["sftp://host/music/*.wav"], [])
    assert [line.paths[0] for line in read_list("train.txt")] == storage.below("sftp://host/music") == urls
    assert storage.spelt("sftp://host/music/") == "sftp://host/music"
    convert_file(urls[0], "a.h5", "pretrained")
    assert read("a.h5").origin.source == urls[0]


def test_files_are_reached_by_ssh(music, tmp_path, monkeypatch):
    with servers.ssh_server(tmp_path) as address:
        keys, host = tmp_path / "home" / ".ssh", (tmp_path / "host.pub").read_text()
        keys.mkdir(parents=True)
        (tmp_path / "user").rename(keys / "id_ed25519")
        (keys / "known_hosts").write_text(f"[127.0.0.1]:{address.rsplit(':')[-1]} {host}")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        url = f"{address}{tmp_path}/music"
        lists([f"{url}/[ab].wav"], [f"{url}/a.wav"])
        assert [line.paths[0] for line in read_list("train.txt")] == [f"{url}/a.wav", f"{url}/b.wav"]
        assert storage.stamp(f"{url}/a.wav")[0] == os.path.getsize("music/a.wav")
        convert_file(f"{url}/a.wav", "a.h5", "pretrained")
        with storage.storing(f"{url}/staging/b.h5") as path:
            path.write_text("b")
        assert storage.below(f"{url}/staging") == [f"{url}/staging/b.h5"]
        storage.remove(storage.below(f"{url}/staging"))
        assert not list(Path("music/staging").iterdir())
        storage._file_system.cache_clear()
    assert read("a.h5").origin.source == f"{url}/a.wav"


def test_what_goes_between_its_listing_and_its_stamp_is_told_by_whoever_opens_it(music):
    assert storage.stamp("memory://bucket/gone.wav") == storage.stamp("music/gone.wav") == []


def test_a_storage_nobody_knows_is_one_line(music):
    lists(["nonsense://bucket/a.wav"], [])
    with pytest.raises(StorageError, match=r"^nonsense://bucket/a\.wav: Protocol not known: nonsense; check the URL") as caught:
        read_list("train.txt")
    assert len(str(caught.value).splitlines()) == 1


def test_a_storage_whose_package_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    lists(["gs://bucket/a.wav"], [])
    with pytest.raises(StorageError, match=r"^gs://bucket/a\.wav: this storage needs another package; pip install gcsfs here"):
        read_list("train.txt")


# ---- fetching and storing --------------------------------------------------------------------------------------------


def test_a_path_of_this_machine_is_itself(music):
    with storage.fetched("music/a.wav") as path:
        assert path == "music/a.wav"


def test_what_is_fetched_is_the_file_and_goes(music, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with storage.fetched("memory://bucket/a.wav") as path:
        assert Path(path).read_bytes() == Path("music/a.wav").read_bytes() and Path(path).suffix == ".wav"
    assert not list(tmp_path.glob("gae-*"))


def test_errors_about_a_copy_name_the_url(music):
    with (
        pytest.raises(AudioError, match=r"^memory://bucket/a\.wav: odd, memory://bucket/a\.wav$"),
        storage.fetched("memory://bucket/a.wav") as path,
    ):
        raise AudioError(f"{path}: odd, {path}")


def test_a_url_without_a_file_is_no_audio(music):
    with pytest.raises(AudioError, match=r"^memory://bucket/x\.wav: there is no such file"), storage.fetched("memory://bucket/x.wav"):
        pass


def test_what_is_stored_is_there_whole_or_not_at_all(music):
    with pytest.raises(RuntimeError), storage.storing("memory://bucket/staging/half.h5") as path:
        path.write_text("half")
        raise RuntimeError
    assert in_memory() == []
    with storage.storing("memory://bucket/staging/whole.h5") as path:
        path.write_text("whole")
    assert in_memory() == ["/bucket/staging/whole.h5"] and music.cat("/bucket/staging/whole.h5") == b"whole"


# ---- index -----------------------------------------------------------------------------------------------------------


def test_the_index_of_urls_is_that_of_files(music, in_this_process):
    lists(["music/a.wav", "music/b.wav\tmusic/c.wav"], ["music/d.wav"])
    indexing.index(values("staging"), "index.json", "memory.json")
    here = Path("index.json").read_text()
    lists(["memory://bucket/a.wav", "memory://bucket/b.wav\tmemory://bucket/c.wav"], ["memory://bucket/d.wav"])
    indexing.index(values("staging"), "index.json", "memory.json")
    assert Path("index.json").read_text() == here.replace("music/", "memory://bucket/")


def test_only_urls_that_changed_are_fetched_again(music, in_this_process):
    lists(["memory://bucket/[abc].wav"], ["memory://bucket/d.wav"])
    indexing.index(values("staging"), "index.json", "memory.json")
    before = read_json("index.json")
    in_this_process.clear()
    indexing.index(values("staging"), "index.json", "memory.json")
    assert not in_this_process and read_json("index.json") == before
    sing("b", 700.0)
    indexing.index(values("staging"), "index.json", "memory.json")
    assert in_this_process == {"examine": ["memory:///bucket/b.wav"]}
    assert [a == b for a, b in zip(read_json("index.json")["train"], before["train"], strict=True)] == [True, False, True]


def test_what_tells_no_version_is_looked_at_each_time(music, in_this_process, monkeypatch):
    """As what a server makes on demand."""
    lists(["memory://bucket/a.wav"], ["memory://bucket/a.wav"])
    info = type(music).info
    monkeypatch.setattr(type(music), "info", lambda *arguments, **more: {**info(*arguments, **more), "created": None, "size": None})
    for frequency in (200.0, 700.0):
        sing("a", frequency)
        indexing.index(values("staging"), "index.json", "memory.json")
        assert read_json("index.json")["train"][0][0]["sha256"] == content_hash("music/a.wav")


@pytest.mark.parametrize(("status", "said"), [(404, "no such file"), (403, "403"), (503, "503")])
def test_what_a_server_says_is_passed_on(status, said):
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(status)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Path("list.txt").write_text(url := f"http://127.0.0.1:{server.server_port}/a.wav")
        with pytest.raises(ListError if status == 404 else StorageError, match=said) as caught:
            read_list("list.txt")
        server.shutdown()
    assert url in str(caught.value) and len(str(caught.value).splitlines()) == 1
    if status == 404:
        with pytest.raises(StorageError, match="check the URL"):  # nobody listens any more
            read_list("list.txt")


def test_a_download_may_take_long_as_long_as_something_comes():
    timeout = storage._file_system("https://example.org").client_kwargs["timeout"]
    assert timeout.total is None and timeout.sock_read and timeout.sock_connect


def test_a_full_disk_here_is_not_blamed_on_the_url(music, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(music), "get", full)
    with pytest.raises(OSError, match=r"No space left on device: '.* \(or another folder, named by TMPDIR\)'"):
        convert_file("memory://bucket/a.wav", "a.h5", "pretrained")


def test_frames_wait_in_storages_that_have_folders(both_lists, in_this_process, tmp_path):
    (tmp_path / "there").mkdir()
    assert run(f"file://{tmp_path}/there") == run("staging", "elsewhere")
    assert not [path for path in (tmp_path / "there").rglob("*") if path.is_file()]
    run("file://there", "elsewhere")  # which this storage spells with the working folder
    assert not [path for path in (tmp_path / "there").rglob("*") if path.is_file()]
    with pytest.raises(StorageError, match="there is no such file or bucket; correct the URL"):
        run(f"file://{tmp_path}/nowhere/at/all", "third")


def test_bad_audio_at_a_url_is_skipped_by_its_name(music, in_this_process, capsys):
    music.pipe("/bucket/text.wav", b"a letter")
    lists(["memory://bucket/text.wav", "memory://bucket/a.wav"], ["music/b.wav"])
    indexing.index(values("staging"), "index.json", "memory.json")
    (skipped,) = read_json("index.json")["skipped"]
    assert skipped["path"] == "memory://bucket/text.wav" and skipped["reason"].startswith("memory://bucket/text.wav: not audio")
    assert capsys.readouterr().err.startswith("warning: skipped memory://bucket/text.wav: not audio")


# ---- frames ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def both_lists(music):
    """One piece to train on, one to convert, and one for both."""
    lists(["memory://bucket/a.wav", "memory://bucket/b.wav"], ["memory://bucket/b.wav", "memory://bucket/c.wav"])


def test_frames_that_waited_at_a_url_are_the_same_bytes(both_lists, in_this_process):
    assert run("memory://bucket/staging", "far") == run("staging", "near")
    assert in_memory() == []


def test_frames_of_urls_are_those_of_files(both_lists, in_this_process):
    run("memory://bucket/staging", "far")
    for role in ("train", "convert"):
        Path(f"{role}.txt").write_text(Path(f"{role}.txt").read_text().replace("memory://bucket", "music"))
    run("staging", "near")
    with Shards("far/train") as far, Shards("near/train") as near:
        assert far.tracks.keys() == near.tracks.keys() and len(far.tracks) == 2
        for there, here in zip(far.lines, near.lines, strict=True):
            assert there[0].path == here[0].path.replace("music", "memory://bucket")
            assert (there[0].duration, there[0].peak, there[0].dtype) == (here[0].duration, here[0].peak, here[0].dtype)
            assert (far.read(there[0].key) == near.read(here[0].key)).all()


def test_what_waits_is_fetched_once(both_lists, in_this_process, monkeypatch):
    fetched = []
    all_fetched = storage.all_fetched
    monkeypatch.setattr("gae.shards.all_fetched", lambda paths: fetched.extend(filter(storage.is_url, paths)) or all_fetched(paths))
    run("memory://bucket/staging")
    assert len(fetched) == len(set(fetched)) == 3


def test_a_run_that_was_killed_goes_on_with_what_waits(both_lists, in_this_process, monkeypatch):
    write_folder = preprocess.shards.write_folder

    def killed(folder, *arguments):
        if folder.name == "convert":
            raise KeyboardInterrupt
        write_folder(folder, *arguments)

    monkeypatch.setattr(preprocess.shards, "write_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        run("memory://bucket/staging")
    assert len(in_memory()) == 3
    monkeypatch.setattr(preprocess.shards, "write_folder", write_folder)
    in_this_process.clear()
    went_on = run("memory://bucket/staging")
    assert not in_this_process and in_memory() == []
    assert went_on == run("staging", "near")


def test_what_lists_lend_each_other_waits_here(both_lists, in_this_process):
    run("memory://bucket/staging")
    lists(["memory://bucket/c.wav"], ["memory://bucket/a.wav", "memory://bucket/b.wav"])
    in_this_process.clear()
    swapped = run("memory://bucket/staging")
    assert not in_this_process and swapped == run("staging", "near")


def test_what_others_put_there_stays(both_lists, in_this_process, music):
    music.pipe("/bucket/staging/mine.txt", b"mine")
    music.pipe(f"/bucket/staging/{'0' * 16}/mine.h5", b"mine")
    music.pipe(f"/bucket/staging/{'0' * 16}/{'1' * 32}-12.h5", b"of other parameters")
    music.pipe(f"/bucket/staging/another/{'0' * 16}/{'1' * 32}-12.h5", b"of another project")
    run("memory://bucket/staging/")
    another = f"/bucket/staging/another/{'0' * 16}/{'1' * 32}-12.h5"
    assert in_memory() == [f"/bucket/staging/{'0' * 16}/mine.h5", another, "/bucket/staging/mine.txt"]


def test_a_damaged_file_that_waits_is_one_line(both_lists, in_this_process, music):
    settings = values("memory://bucket/staging")
    indexing.index(settings, "index.json", "memory.json")
    place = f"memory://bucket/staging/{digest([settings.cqt.model_dump(), settings.data.dtype, preprocess._code()])[:16]}"
    key = read_json("index.json")["train"][0][0]["key"]
    music.pipe(f"{place}/{key}-32.h5", b"half")
    with pytest.raises(
        FormatError, match=rf"^memory:///bucket/staging/\w+/{key}-32\.h5: not a readable shard .*; delete it and run"
    ) as caught:
        preprocess.preprocess(settings, Path("index.json"), Path("shards"))
    assert len(str(caught.value).splitlines()) == 1 and "gae-" not in str(caught.value)


def test_a_file_that_is_gone_after_the_index_stops_the_run(both_lists, in_this_process, music):
    settings = values("memory://bucket/staging")
    indexing.index(settings, "index.json", "memory.json")
    music.rm("/bucket/a.wav")
    with pytest.raises(AudioError, match=r"^memory://bucket/a\.wav: changed, or can't be read any more; run again$"):
        preprocess.preprocess(settings, Path("index.json"), Path("shards"))
    sing("a", 200.0)
    sing("b", 700.0)
    with pytest.raises(AudioError, match=r"^memory://bucket/b\.wav: changed while it was read; run again$"):
        preprocess.preprocess(values("memory://bucket/other"), Path("index.json"), Path("afresh"))


def test_frames_that_do_not_arrive_are_one_line(music, monkeypatch):
    lists(["music/a.wav"], ["music/b.wav"])
    settings = values("staging")
    indexing.index(settings, "index.json", "memory.json")
    monkeypatch.setattr(preprocess, "map_tracks", lambda function, items, *_: [None for _ in items])
    with pytest.raises(StorageError, match=r"^staging/[0-9a-f]+: 2 of 2 computed tracks do not arrive here; let compute\.staging name"):
        preprocess.preprocess(settings, Path("index.json"), Path("shards"))


# ---- where work runs -------------------------------------------------------------------------------------------------


def test_workers_that_stage_at_a_url_are_given_no_local_files():
    shared = params.Compute(scheduler="tcp://127.0.0.1:9", workers=500)
    apart = shared.model_copy(update={"staging": "s3://bucket/staging"})
    files = ["a.wav", "s3://bucket/b.wav", "/c.wav"]
    assert computing.by_place(files, shared) == [(shared, files)] and computing.beside_files(shared) is shared
    (here, local), (there, remote) = computing.by_place(files, apart)
    assert (local, remote) == (["a.wav", "/c.wav"], ["s3://bucket/b.wav"])
    assert there is apart and (here.scheduler, here.cluster, here.workers) == ("local", "none", 0)
    assert computing.beside_files(params.Compute(staging="s3://bucket/staging", workers=3)).workers == 3


def test_a_worker_that_does_not_see_the_folder_is_one_line():
    with pytest.raises(GaeError, match=r"^/no/where: not seen by the worker on .* \(No such file or directory\); share it, or name"):
        computing._at("/no/where", None, None, len, "")


def test_a_worker_with_another_gae_is_one_line():
    assert computing._at(None, None, computing._code(), len, "four") == 4
    with pytest.raises(
        GaeError, match=r"^the worker on .* has another gae, or other versions of librosa, .* than this machine; install the same there and"
    ):
        computing._at(None, None, "0" * 64, len, "four")


# ---- features --------------------------------------------------------------------------------------------------------


def test_features_of_urls_have_readable_names_of_their_own():
    urls = [
        "s3://bucket/takes/Für Elise.flac",
        "s3://bucket/one/song.flac",
        "s3://bucket/two/song.flac",
        "s3://other/song.flac",
        "https://example.org/get/F%C3%BCr%20Th%C3%A9r%C3%A8se.flac?key=a/b.c",
        "https://example.org/",
        "music/song.flac",
    ]
    names = feature_names(urls)
    assert len({name.casefold() for name in names.values()}) == len(urls)
    assert [names[urls[n]] for n in (0, 4, 5)] == ["Für_Elise", "Für_Thérèse", "track"]
    assert [names[url].rpartition("-")[0] for url in urls[1:4]] == ["one-song", "two-song", "other-song"]


def test_one_file_at_a_url_is_converted(music):
    convert_file("memory://bucket/a.wav", "far.h5", tiny.model())
    convert_file("music/a.wav", "near.h5", tiny.model())
    far, near = read("far.h5"), read("near.h5")
    assert (far.values == near.values).all() and far.origin.source == "memory://bucket/a.wav"
    assert far.origin.source_sha256 == near.origin.source_sha256


# ---- a cluster and a bucket ------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(s3, tmp_path, monkeypatch):
    """A client of S3 with a bucket `audio` of ten tracks, which also lie below music/."""
    for name, value in {
        "ENDPOINT_URL": s3,
        "ACCESS_KEY_ID": "nobody",
        "SECRET_ACCESS_KEY": "nothing",
        "DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="audio")
    tracks()
    for name in TRACKS:
        client.upload_file(f"music/{name}.wav", "audio", f"{name}.wav")
    yield client
    for name in keys(client):
        client.delete_object(Bucket="audio", Key=name)
    client.delete_bucket(Bucket="audio")


def tracks():
    Path("music").mkdir()
    for number, name in enumerate(TRACKS):
        soundfile.write(f"music/{name}.wav", tiny.tone(20, 8000, 200.0 + 10 * number), 8000)


def keys(client, prefix=""):
    return [found["Key"] for found in client.list_objects_v2(Bucket="audio", Prefix=prefix).get("Contents", [])]


def listed(folder):
    """Two tracks in views, one on both lists."""
    names = [f"{folder}/{name}.wav" for name in TRACKS]
    lists([*names[:6], "\t".join(names[6:8])], names[7:])


@contextmanager
def killing(worker, waiting):
    """Stop a worker in the middle of its work, and kill it when three tracks of the ten wait."""

    def watch():
        for signal_, least in ((signal.SIGSTOP, 1), (signal.SIGKILL, 3)):
            while len(waiting()) < least and worker.poll() is None:
                time.sleep(0.01)
            worker.send_signal(signal_)
        found.extend(waiting())

    found = []
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    thread.join()
    assert worker.wait(timeout=10) == -signal.SIGKILL and 3 <= len(found) < len(TRACKS)


def test_a_bucket_gives_what_files_give(bucket):
    listed("s3://audio")
    far = run("s3://audio/staging", "far")
    assert keys(bucket, "staging") == [] and far == run("staging", "near")
    with Shards("far/train") as found:
        assert [track.path for line in found.lines for track in line] == [f"s3://audio/{name}.wav" for name in TRACKS[:8]]


def test_a_cluster_that_shares_a_bucket_and_loses_a_worker_gives_the_same_bytes(bucket, cluster):
    address, workers = cluster
    listed("s3://audio")
    near = run("staging", "near")
    os.unlink("memory.json")
    with killing(workers[0], lambda: keys(bucket, "staging")):
        far = run("s3://audio/staging", "far", scheduler=address)
    assert far == near and keys(bucket, "staging") == []


def test_a_cluster_that_shares_files_and_loses_a_worker_gives_the_same_bytes(cluster):
    address, workers = cluster
    tracks()
    listed("music")
    near = run("staging", "near")
    os.unlink("memory.json")
    with killing(workers[0], lambda: list(Path("staging").glob("*/[0-9a-f]*.h5"))):
        far = run("staging", "far", scheduler=address)
    assert far == near and not Path("staging").exists()


def test_a_bucket_is_listed(bucket):
    lists(["s3://audio/t[2-4].wav", "s3://audio/**/t9.wav"], [])
    assert [line.paths[0] for line in read_list("train.txt")] == [f"s3://audio/t{number}.wav" for number in (2, 3, 4, 9)]
    bucket.put_object(Bucket="audio", Key="disc/")  # as what consoles show as a folder
    assert storage.matching("s3://audio/**") == [f"s3://audio/{name}.wav" for name in TRACKS]
    stamp = storage.stamp("s3://audio/t2.wav")
    bucket.upload_file("music/t3.wav", "audio", "t2.wav")
    assert storage.stamp("s3://audio/t2.wav") != stamp  # of one size
    lists(["s3://audio"], [])
    with pytest.raises(ListError, match=r"^train\.txt, line 1: s3://audio is a folder; write s3://audio/\*"):
        read_list("train.txt")


def test_a_bucket_that_is_not_there_is_one_line(bucket):
    lists(["s3://audio/t0.wav", "s3://nowhere/t0.wav"], [])
    with pytest.raises(ListError, match=r"^train\.txt, line 2: no such file: s3://nowhere/t0\.wav"):
        read_list("train.txt")
    lists(["s3://audio/t0.wav"], ["s3://audio/t1.wav"])
    with pytest.raises(StorageError, match=r"^s3://nowhere/staging/.*: there is no such file or bucket; correct the URL$"):
        run("s3://nowhere/staging")
