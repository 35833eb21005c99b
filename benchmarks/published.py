"""The shipped weights beside those that the original implementation publishes, on music and sounds neither was trained on.

    python benchmarks/published.py [--weights FILE_OR_NAME ...] [--transposed BINS ...] [--stretched SHARE ...]
                                   [--soundfont FILE.sf2] [--jkupdd FOLDER] [--performances FOLDER] [--cents CENTS]
                                   [--corpus data/corpus] [--out FILE.json]

piano       the JKU Patterns Development Database (T. Collins, 2013: its .mid and -poly.csv files in one folder, by default
            ../shared/data/jkupdd) played with a SoundFont of your choice (Debian's fluid-soundfont-gm has one), human-like in
            time and loudness, as written and transposed by -6 to 6 semitones;
            also alignment of a rendering at a steady tempo with a freely timed performance on another piano, pedal down;
            each piece is there in three takes that differ in little but tempo, so once more with one take of each (piano, 1 take)
performed   human performances on the piano, pedal and all, minutes of them played with the same SoundFont, as they are and transposed: ten
            of MAESTRO (C. Hawthorne et al., 2019), which lie in the source archive of MidiTok (`pip download --no-deps --no-binary :all:
            miditok==3.1.0`, its folder tests/MIDIs_one_track);
            also alignment with a plain rendering of the same notes: chords struck together, equally loud, no pedal, another piano, at
            another tempo (0.7 to 1.4 times) that comes and goes by a fifth
wesnoth, hyperrogue, warzone2100, singularity
            one minute each of up to 24 pieces of the music of a game (Debian's packages wesnoth-1.16-music, hyperrogue-music,
            warzone2100-music, singularity-music), as it is and shifted by Rubber Band (rubberband-cli)
corpus      the held-out pieces of the built-in corpus: also alignment with another performance, transposed and not, and the error with
            which transposed frames are rebuilt

Figures stand with their standard errors, by bootstrap over the pieces; a table of most without them comes last. What `--out` names gets
all figures, is not measured again where it has them, and may be written to by several at once. Sets whose material or tools are missing
are left out, and named. The published weights are read from ../shared/data/cgae_pretrained.npz, beside the checkout, if it is there;
otherwise `gae import-weights model.save --out FILE` makes a file for `--weights` from what the original's own repository (cgae-invar)
holds. They are also shown with their frames compressed as ours are. `--transposed` and `--stretched` show all of ours once more with
features over other transpositions and tempi than they say (`model.transposed`, `model.stretched`, on which no step of a training
depends). Beside the weights stands the constant-Q transform of the first of them, moved back by the known interval, a frame alone and
with all those of the context.
"""

import argparse
import io
import itertools
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pretty_midi
import soundfile
from results import markdown, measured, record
from tqdm import tqdm

import gae
from gae import audio
from gae.corpus import OTHER_TEMPI
from gae.cqt import frames, transpose
from gae.evaluate import TOLERANCES, copy_error, delayed, heldout_file, heldout_pieces, reconstruction_error
from gae.mapping import extract_frames
from gae.measures import align, beats_within, bootstrap, invariance_top1, pool, stack
from gae.modelfile import SHIPPED
from gae.original import from_arrays
from gae.scores import NOTE
from gae.synthesis import COMPASS, SAMPLE_RATE, STEADY, Manner, Take, perform, synthesise

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
RECORDINGS = {
    "wesnoth": "/usr/share/games/wesnoth/1.16/data/core/music",
    "hyperrogue": "/usr/share/hyperrogue/music",
    "warzone2100": "/usr/share/games/warzone2100/music",
    "singularity": "/usr/share/games/singularity/music",
}
TEMPI = {"wtc2f20": 84, "sonata01-3": 192, "mazurka24-4": 138, "silverswan": 54, "sonata04-2": 120}  # quarter notes a minute
ROMANTIC = Manner(rubato=0.15, jitter=0.015, dynamics=14.0, accents=8.0, slowing=0.5, held=(0.6, 1.05))
PLAIN = Manner(rubato=0.2, jitter=0.0, dynamics=0.0, accents=0.0, slowing=0.0, held=(1.0, 1.0))
SHIFTS = [k for k in range(-6, 7) if k]
FRAMES, STACK = 100, 8  # frames a track, frames stacked
COLUMNS = ["performed", "piano", "piano, 1 take", *RECORDINGS, "corpus", "beats, performed", "beats, piano", "beats, corpus", "error"]
HOP = 0.04  # s, about the hop of alignment
TAKES = 3  # of each piece for the piano


def piano_pairs(jkupdd, soundfont, folder):
    """Renderings of the JKUPDD pieces: a list of (piece, original, transposed, semitones)."""
    import midirenderer

    pairs = []
    for number, path in enumerate(sorted(Path(jkupdd).glob("*.mid"))):
        for take in range(TAKES):
            rng = np.random.default_rng([number, take])
            score = pretty_midi.PrettyMIDI(str(path))
            notes = [note for part in score.instruments for note in part.notes if note.start < 90]
            stretch = rng.uniform(0.85, 1.15)
            for note in notes:
                start, length = note.start * stretch + rng.normal(0, 0.01), (note.end - note.start) * stretch
                note.start, note.end = max(0.0, start), max(0.0, start) + max(0.05, length)
                note.velocity = int(np.clip(rng.normal(75, 12), 30, 120))
            k, rendered = int(rng.choice(SHIFTS)), []
            for shift in (0, k):
                out = pretty_midi.PrettyMIDI()
                piano = pretty_midi.Instrument(0)
                piano.notes = [pretty_midi.Note(n.velocity, n.pitch + shift, n.start, n.end) for n in notes]
                out.instruments.append(piano)
                midi = io.BytesIO()
                out.write(midi)
                wave = midirenderer.render_wave_from(Path(soundfont).read_bytes(), midi.getvalue())
                rendered.append(folder / f"{path.stem}-{take}-{shift}.wav")
                rendered[-1].write_bytes(wave)
            pairs.append((path.stem, *rendered, k))
    return pairs


def performed_pairs(midi, soundfont, folder):
    """Up to three minutes of each of MAESTRO's performances in a folder, played: a list of (piece, original, transposed, semitones)."""
    import midirenderer

    pairs = []
    for number, (piece, start, part) in enumerate(minutes(midi)):
        k, rendered = int(np.random.default_rng(number).choice(SHIFTS)), []
        for shift in (0, k):
            wave = midirenderer.render_wave_from(Path(soundfont).read_bytes(), minute_from(start, part, shift))
            rendered.append(folder / f"performed-{number}-{shift}.wav")
            rendered[-1].write_bytes(wave)
        pairs.append((piece, *rendered, k))
    return pairs


def performed_plainly(midi, soundfont, folder):
    """Alignments to make with the same minutes, played plainly at another tempo: as `piano_performances`. Beats are chords or notes."""
    tasks = []
    for number, (piece, start, part) in enumerate(minutes(midi)):
        rng, k = np.random.default_rng([number, 1]), int(np.random.default_rng(number).choice(SHIFTS))
        within = [note for note in part.notes if start <= note.start < start + 60 and COMPASS[0] + 6 < note.pitch <= COMPASS[1] - 6]
        played = sorted(within, key=lambda note: note.start)
        notes = np.zeros(len(played), NOTE)
        notes["pitch"] = [note.pitch for note in played]
        notes["onset"] = 2 * together(np.array([note.start - start for note in played]))  # in quarters, of half a second each
        notes["length"] = [2 * (note.end - note.start) for note in played]
        plain = perform(notes, 120 * np.exp(rng.uniform(*np.log(OTHER_TEMPI))), PLAIN, rng)
        beats = np.unique(notes["onset"])
        beats = beats[np.diff(beats, prepend=-1) > 0.4]
        task = {"piece": piece, "k": k, "beats": {"score": plain.times(beats), "performance": beats / 2}}
        takes = {"original": Take(plain, (1,), 0), "transposed": Take(plain, (1,), k)}
        task |= rendered(notes, takes, soundfont, folder, f"plain-{number}")
        tasks.append(task | {"performance": folder / f"performed-{number}-0.wav"})
    return tasks


def minutes(midi):
    """The piece, the first second and the part of each of the minutes of MAESTRO's performances in a folder."""
    for path in sorted(Path(midi).glob("Maestro_*.mid")):
        played = pretty_midi.PrettyMIDI(str(path))
        count = min(3, 1 + int(played.get_end_time() // 240))
        for number in range(count):
            yield path.stem, played.get_end_time() * (number + 0.5) / count - 30, played.instruments[0]


def together(onsets, within=0.04):
    """Onsets (n,) in s, in order, those that follow the first of a chord within so many s moved to it."""
    chords = onsets.copy()
    for number in range(1, len(onsets)):
        if onsets[number] - chords[number - 1] <= within:
            chords[number] = chords[number - 1]
    return chords


def minute_from(start, part, shift):
    """Notes and pedal of a minute of a part, transposed, as the bytes of a MIDI file."""
    piano = pretty_midi.Instrument(0)
    notes = [note for note in part.notes if start <= note.start < start + 60 and COMPASS[0] < note.pitch + shift <= COMPASS[1]]
    piano.notes = [pretty_midi.Note(note.velocity, note.pitch + shift, note.start - start, note.end - start) for note in notes]
    pedal = [change for change in part.control_changes if change.number == 64 and start <= change.time < start + 60]
    piano.control_changes = [pretty_midi.ControlChange(64, change.value, change.time - start) for change in pedal]
    midi, file = pretty_midi.PrettyMIDI(), io.BytesIO()
    midi.instruments.append(piano)
    midi.write(file)
    return file.getvalue()


def piano_performances(jkupdd, soundfont, folder):
    """Alignments to make with the JKUPDD pieces: a list of dict.

    piece; original, transposed, performance: audio files; k: semitones; beats: score and performance, times in s of the same beats.
    """
    tasks = []
    for number, (name, tempo) in enumerate(TEMPI.items()):
        table = np.loadtxt(Path(jkupdd) / f"{name}-poly.csv", delimiter=",")
        table = table[table[:, 0] < tempo]  # the first minute
        for take in range(TAKES):
            rng = np.random.default_rng([number, take])
            notes = np.zeros(len(table), NOTE)
            notes["onset"], notes["pitch"], notes["length"] = table[:, 0] - table[:, 0].min(), table[:, 1], table[:, 3]
            steady, free = perform(notes, tempo, STEADY, rng), perform(notes, tempo * rng.uniform(0.75, 1.25), ROMANTIC, rng)
            lifted = free.times(2 * np.ceil(free.quarters_at(free.ends) / 2))  # the pedal, every two quarters
            free = replace(free, ends=np.where(rng.random(len(notes)) < 0.5, lifted, free.ends))
            beats, k = np.arange(math.ceil(notes["onset"].max())), int(rng.choice(SHIFTS))
            task = {"piece": name, "k": k, "beats": {"score": steady.times(beats), "performance": free.times(beats)}}
            takes = {
                "original": Take(steady, (0,), 0),
                "transposed": Take(steady, (0,), k),
                "performance": Take(free, (1,), 0),
            }
            task |= rendered(notes, takes, soundfont, folder, f"{name}-{take}")
            tasks.append(task)
    return tasks


def rendered(notes, takes, soundfont, folder, name):
    """The audio files of takes of the notes, by their kind."""
    files = {kind: folder / f"{name}-{kind}.wav" for kind in takes}
    for kind, take in takes.items():
        samples = synthesise(notes, take, take.performance.duration, Path(soundfont).read_bytes())
        soundfile.write(files[kind], samples, SAMPLE_RATE)
    return files


def corpus_performances(corpus):
    """Alignments to make with the held-out pieces of the built-in corpus, as `piano_performances`."""
    takes = ("original", "transposed", "performance")
    return [
        {"piece": piece["id"], "k": piece["k"], "beats": piece["beats"]} | {take: heldout_file(corpus, piece, take) for take in takes}
        for piece in heldout_pieces(corpus)
        if piece["beats"]["score"]
    ]


def recording_pairs(source, folder, cents=0, count=24):
    """Excerpts of recordings, and the same shifted by Rubber Band, `cents` off: a list of (piece, original, transposed, semitones)."""
    files = sorted(path for path in Path(source).rglob("*") if path.suffix in {".ogg", ".opus", ".flac", ".mp3", ".wav"})
    files = [path for path in files if path.stat().st_size > 500_000]
    pairs = []
    for number, path in enumerate(files[:: max(1, len(files) // count)][:count]):
        k = int(np.random.default_rng(number).choice(SHIFTS))
        samples = audio.load(path, 44100)
        middle = max(0, len(samples) // 2 - 30 * 44100)
        original, shifted = (folder / f"{Path(source).parts[-2]}-{number}{kind}.wav" for kind in ("", "-shifted"))
        soundfile.write(original, samples[middle : middle + 60 * 44100], 44100)
        subprocess.run(["rubberband", "-q", "-p", str(k + cents / 100), original, shifted], check=True, capture_output=True)
        pairs.append((number, original, shifted, k))
    return pairs


def corpus_pairs(corpus):
    """The held-out pieces of the built-in corpus: a list of (piece, original, transposed, semitones)."""
    takes = ("original", "transposed")
    return [(piece["id"], *(heldout_file(corpus, piece, take) for take in takes), piece["k"]) for piece in heldout_pieces(corpus)]


@cache
def frames_of(path, cqt):
    """Frames of an audio file: (n_frames, n_bins)."""
    return frames(audio.load(path, cqt.sample_rate), cqt)


def features_at(model, path, _):
    """Features of an audio file, in whatever key: (n_frames, n_maps)."""
    return extract_frames(frames_of(path, model.cqt), model)


def shifted_back(model, path, k):
    """Frames of an audio file, moved down by k semitones: (n_frames, n_bins)."""
    return transpose(frames_of(path, model.cqt), -model.cqt.bins(k))


def shifted_back_in_context(model, path, k):
    """The same, each beside the frames of the model's context: (n_frames, (context + 1) n_bins)."""
    return np.concatenate(list(delayed(shifted_back(model, path, k), [*model.sizes.lags, 0])), axis=1)


def invariance(pairs, represent):
    """Top-1 for one frame and for eight stacked, over all pairs together; `represent` takes a path and its semitones."""
    queries, candidates = {1: [], STACK: []}, {1: [], STACK: []}
    for number, (_, original, transposed, k) in enumerate(tqdm(pairs, leave=False)):
        one, other = represent(original, 0), represent(transposed, k)
        starts = np.random.default_rng(number).choice(min(len(one), len(other)) - STACK, FRAMES, replace=False)
        for n in queries:
            queries[n].append(stack(one, starts, n))
            candidates[n].append(stack(other, starts, n))
    found = [invariance_top1(np.concatenate(queries[n]), np.concatenate(candidates[n])).reshape(len(pairs), -1).mean(1) for n in queries]
    return figures([piece for piece, *_ in pairs], np.transpose(found))


def alignment(tasks, represent, seconds, take):
    """Beats within each tolerance when the rendering `take`, original or transposed, is aligned with the performance.

    Frames are `seconds` apart.
    """
    shares, n = [], max(1, round(HOP / seconds))
    for task in tqdm(tasks, leave=False):
        score, performance = represent(task[take], task["k"] if take == "transposed" else 0), represent(task["performance"], 0)
        times = align(pool(score, n), pool(performance, n)).times(task["beats"]["score"], n * seconds, (n - 1) / 2 * seconds)
        shares.append(beats_within(times, task["beats"]["performance"], TOLERANCES.values()))
    return figures([task["piece"] for task in tasks], shares)


def figures(pieces, shares):
    """Means of shares (n_tracks, n) in percent, and standard errors over the pieces: takes of one piece fail together."""
    shares = 100 * np.asarray(shares)
    groups = [shares[[other == piece for other in pieces]].mean(0) for piece in dict.fromkeys(pieces)]
    return {"mean": shares.mean(0).round(3).tolist(), "se": np.round(bootstrap(groups, 1000, seed=1), 3).tolist()}


def shown(measure):
    """Figures with their standard errors as text."""
    return " / ".join(f"{mean} ± {error}" for mean, error in zip(*map(rounded, (measure["mean"], measure["se"])), strict=True)) + " %"


def rounded(values):
    """Figures of a column: errors, of which there is one, are small."""
    return [f"{value:.{2 if len(values) == 1 else 1}f}" for value in values]


def rebuilding(pairs, model, shift=12):
    """The error in percent of the power with which frames are rebuilt, moved by up to `shift` bins."""
    return errors_of(pairs, model, lambda frames, rng: reconstruction_error(frames, model.network, shift, rng))


def errors_of(pairs, model, function):
    """The error in percent that a function gives of frames (n_frames, n_bins) and a random generator, over the originals of pairs."""
    originals = [frames_of(original, model.cqt) for _, original, _, _ in tqdm(pairs, leave=False)]
    return figures([piece for piece, *_ in pairs], [[function(frames, np.random.default_rng(n))] for n, frames in enumerate(originals)])


def kinds_of(weights, transpositions, stretches):
    """What is compared, by label: model, `represent` as `invariance` and `alignment` take it, and whether the model rebuilds frames."""
    models = {label(file): gae.load_model(file) for file in weights}
    if len(models) < len(weights):
        sys.exit("--weights: two files of one name, which stands for them in tables; rename one")
    ours = next(iter(models.values()))
    if transpositions or stretches:
        for (name, model), bins, share in itertools.product(list(models.items()), transpositions or [None], stretches or [None]):
            named = [name, *([f"{bins} bins"] if bins is not None else []), *([f"stretched {share:g}"] if share is not None else [])]
            changes = {key: value for key, value in (("transposed", bins), ("stretched", share)) if value is not None}
            models[", ".join(named)] = replace(model, sizes=model.sizes.model_copy(update=changes))
    if (SHARED / "cgae_pretrained.npz").exists():
        published = from_arrays(**np.load(SHARED / "cgae_pretrained.npz"))
        compressed = published.cqt.model_copy(update={"compression": ours.cqt.compression, "gain": ours.cqt.gain})
        models |= {"published": published, "published, compressed": replace(published, cqt=compressed)}
    kinds = {name: (model, partial(features_at, model), True) for name, model in models.items()}
    kinds["CQT back"] = ours, partial(shifted_back, ours), False
    kinds["CQT back, context"] = ours, partial(shifted_back_in_context, ours), False
    return kinds


def label(file):
    """How weights are called in tables: by the name of their file."""
    return Path(file).name.removesuffix(".safetensors")


def material(given, folder):
    """Sets of pairs and of performances, by name, of what there is of the music."""
    sets, performances = {}, {}
    if there("performed", Path(given.soundfont).exists() and given.performances, "--soundfont and --performances"):
        sets["performed"] = performed_pairs(given.performances, given.soundfont, folder)
        performances["performed"] = performed_plainly(given.performances, given.soundfont, folder)
    if there("piano", Path(given.soundfont).exists() and given.jkupdd.exists(), "--soundfont and --jkupdd"):
        sets["piano"] = piano_pairs(given.jkupdd, given.soundfont, folder)
        sets["piano, 1 take"] = sets["piano"][::TAKES]
        performances["piano"] = piano_performances(given.jkupdd, given.soundfont, folder)
    for name, music in RECORDINGS.items():
        if there(name, Path(music).exists() and shutil.which("rubberband"), f"{music} and rubberband"):
            sets[name] = recording_pairs(music, folder, given.cents)
    if there("corpus", Path(given.corpus, "corpus.json").exists(), "--corpus, as make repro makes it"):
        sets["corpus"] = corpus_pairs(given.corpus)
        performances["corpus"] = corpus_performances(given.corpus)
    return sets, performances


def there(name, present, needed):
    """Whether a set's material is present; a line where it is not."""
    if not present:
        print(f"{name}: left out; it needs {needed}", file=sys.stderr)
    return present


def measures(sets, performances, model, represent, rebuilds):
    """What there is to measure of a kind, by the name of its column: functions that measure it."""
    found = {name: partial(invariance, pairs, represent) for name, pairs in sets.items()}
    for name, tasks in performances.items():
        for take, spelt in (("transposed", ""), ("original", ", as written")):
            found[f"beats, {name}{spelt}"] = partial(alignment, tasks, represent, model.cqt.frame_seconds, take)
    if rebuilds and "corpus" in sets:
        found["error"] = partial(rebuilding, sets["corpus"], model)
        found["of the frame before"] = partial(errors_of, sets["corpus"], model, lambda frames, _: copy_error(frames))
    return found


def table(results, first):
    """The results as a Markdown table: means, a row for each kind, those named `first` in that order."""
    columns = [column for column in COLUMNS if any(column in row for row in results.values())]
    names = [name for name in dict.fromkeys([*first, *results]) if name in results]
    cells = [[rounded(results[name][column]["mean"]) if column in results[name] else [] for column in columns] for name in names]
    return markdown(["", *columns], [[name, *map(" / ".join, row)] for name, row in zip(names, cells, strict=True)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=SHIPPED, help="model files, or names of shipped weights (default: all of these)")
    parser.add_argument("--transposed", nargs="+", type=int, default=[], metavar="BINS", help="show features over these transpositions too")
    parser.add_argument("--stretched", nargs="+", type=float, default=[], metavar="SHARE", help="show features over these tempi too")
    parser.add_argument("--soundfont", default="/usr/share/sounds/sf2/FluidR3_GM.sf2")
    parser.add_argument("--jkupdd", type=Path, default=SHARED / "jkupdd")
    parser.add_argument("--performances", type=Path, help="a folder with MAESTRO's Maestro_*.mid")
    parser.add_argument("--cents", type=float, default=0, help="shift recordings by so much more than whole semitones")
    parser.add_argument("--corpus", default="data/corpus")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON that keeps the figures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder, "results.json")
        if given.cents and measured(out):
            sys.exit(f"--out: {out} has figures already, which --cents would stand among; name a new file")
        sets, performances = material(given, Path(folder))
        kinds = kinds_of(given.weights, given.transposed, given.stretched)
        for name, kind in kinds.items():
            for column, measure in measures(sets, performances, *kind).items():
                if column not in measured(out).get(name, {}):
                    row = record(out, name, column, measure())[name]
                    print(f"{name:24} {column:24} {shown(row[column])}", flush=True)
        print(table(measured(out), kinds))
