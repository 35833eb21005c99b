"""The built-in demo music: scores that music21 ships, played with the SoundFont that pretty_midi ships.

A score is read into notes; a seeded performance gives every note its time and its loudness; a synthesiser plays the
performance in several takes. For training these are *views*: one performance in other sounds and keys, equal in timing,
some as a person would play it: freer in time, each view in a loudness of its own, with the pedal where sounds decay.
Some of the pieces are arranged: with outer parts in octaves, or in another register.
For evaluation a piece is played as written, the same transposed, and once more as another player would in another sound.
Repeat signs, ornaments and grace notes are not played.
"""

import functools
import hashlib
import importlib.util
import io
import itertools
import re
import shutil
import warnings
import zlib
from collections import deque
from concurrent.futures import wait
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from gae.compute import beside_files, n_cores, submitting
from gae.errors import ParamsError
from gae.files import code_digest, content_hash, digest, read_json, sweep, write_json

SAMPLE_RATE = 22_050  # Hz
HELDOUT_SHIFT = 6  # semitones: a held-out piece is transposed by at most this

_PLAYERS = ("music21", "midirenderer", "pretty_midi", "soundfile", "soxr")  # packages that decide how a piece sounds
_SECONDS = (20.0, 210.0)  # shorter pieces are left out, longer ones end early
_LEAD_IN, _TAIL = 0.25, 1.0  # s before the first note and after the last
_PEAK = 0.8  # of full scale
_RANGE = (27, 102)  # MIDI pitches that a score may hold
_OUTWARDS, _REGISTERS = (0.3, 0.4, 0.3), (0.15, 0.55, 0.3)  # of arranged pieces: shares of what becomes of an outer part, and of all
_CHANNELS = 15  # parts that sound at once: the 16 of MIDI without the drums
# Of two unrelated chorales at most 0.3 of the phrases agree, of two harmonisations of one melody as a rule 0.35 to 1.
_PHRASE, _ALIKE, _FEW = 8, 0.3, 20  # intervals in a phrase; that share; fewer phrases than these count as these


# ---- what is played


@dataclass(frozen=True)
class Kind:
    """Scores of one kind: their share among the pieces, their tempo in quarter notes a minute, and where they are.

    `sources` are pairs of composer (None: as the score says) and a pattern of paths in music21's corpus.
    """

    name: str
    share: float
    tempo: tuple
    sources: tuple


KINDS = (
    Kind("chorale", 4, (60, 88), (("Johann Sebastian Bach", "bach/*.mxl"),)),
    Kind(
        "quartet",
        4,
        (84, 144),
        (
            ("Joseph Haydn", "haydn/*/*.mxl"),
            ("Wolfgang Amadeus Mozart", "mozart/k[148]*/*.mxl"),
            ("Ludwig van Beethoven", "beethoven/**/*.mxl"),
            ("Robert Schumann", "schumann_robert/opus41no1/*.mxl"),
        ),
    ),
    Kind(
        "madrigal",
        2,
        (100, 140),
        (("Claudio Monteverdi", "monteverdi/*[0-9].mxl"), ("Vicente Lusitano", "lusitano/*.mxl")),
    ),
    Kind("mass", 3, (130, 180), (("Giovanni Pierluigi da Palestrina", "palestrina/*.krn"),)),
    Kind("chanson", 1, (120, 160), (("Josquin des Prez", "josquin/*.abc"),)),
    Kind("trecento", 1, (76, 104), ((None, "trecento/*.xml"),)),
    Kind("tune", 1, (110, 160), (("traditional", "ryansMammoth/*.abc"),)),
    Kind(
        "piano",
        2,
        (80, 132),
        (
            ("Carl Philipp Emanuel Bach", "cpebach/*.mxl"),
            ("Wolfgang Amadeus Mozart", "mozart/k545/*.mxl"),
            ("Frédéric Chopin", "chopin/*.krn"),
            ("Clara Schumann", "schumann_clara/*.mxl"),
            ("Arnold Schoenberg", "schoenberg/*/*.mxl"),
        ),
    ),
    Kind("ragtime", 1, (84, 108), (("Scott Joplin", "joplin/*.mxl"),)),
    Kind(
        "song",
        2,
        (66, 108),
        (
            ("George Frideric Handel", "handel/*/*.mxl"),
            ("Franz Schubert", "schubert/*.xml"),
            ("Robert Schumann", "schumann_robert/*.xml"),
            ("Stephen Foster", "leadSheet/foster*.mxl"),
            ("Giuseppe Verdi", "verdi/*.mxl"),
            ("Liliʻuokalani", "liliuokalani/*.mxl"),
            ("Amy Beach", "beach/*.musicxml"),
            ("J. Rosamond Johnson", "johnson_j_r/*.mxl"),
            ("Anton Webern", "webern/*.mxl"),
        ),
    ),
    Kind("trio", 1, (72, 120), (("Clara Schumann", "schumann_clara/*/*.xml"), ("Arcangelo Corelli", "corelli/*/*.xml"))),
)

# General MIDI programs, from 0. Left out are drums, effects, and what this SoundFont plays out of tune or late.
FAMILIES = {
    "piano": (0, 1, 2, 3, 4, 5),
    "keyboard": (6, 7, 10, 11),
    "organ": (16, 18, 19, 20),  # the first three with a stop an octave below
    "plucked": (24, 25, 26, 27, 45, 46, 104, 105, 107),
    "strings": (40, 41, 42, 43, 44, 48, 110),
    "voice": (53, 85),
    "brass": (56, 57, 58, 59, 60, 61, 62, 63),
    "reed": (64, 66, 69, 70, 71, 109, 111),
    "pipe": (72, 73, 74, 75),
    "synth": (79, 80, 81, 82, 83, 90, 94),
}
FAMILY_SHARES = {"piano": 4.0}  # 1 for the others
DECAYING = [program for family in ("piano", "keyboard", "plucked") for program in FAMILIES[family]]

# MIDI pitches that a sound plays in tune and in time, as measured
COMPASS = (20, 108)
COMPASSES = {
    11: (33, 108), 45: (20, 104), 57: (20, 95), 58: (20, 97), 59: (20, 96), 60: (20, 96), 61: (20, 93), 62: (20, 93), 63: (20, 93),
    64: (20, 104), 66: (20, 104), 72: (67, 108), 73: (55, 108), 74: (62, 108), 75: (55, 108), 81: (20, 90), 83: (20, 92), 105: (20, 104),
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A score that can be played. Pieces of one `work` never stand on both sides of the split."""

    id: str
    kind: str
    work: str
    composer: str | None
    source: str
    tempo: tuple


def catalogue():
    """All pieces of all kinds.

    Returns
    -------
    list of Piece
        In a fixed order.
    """
    pieces, root = [], _package("music21") / "corpus"
    for kind in KINDS:
        for composer, pattern in kind.sources:
            for path in sorted(root.glob(pattern)):
                source = path.relative_to(root)
                name = re.sub(r"[^a-z0-9.]+", "-", source.with_suffix("").as_posix().lower()).strip("-")
                pieces.append(Piece(name, kind.name, _work(root, source), composer, source.as_posix(), kind.tempo))
    return pieces


def _work(root, source):
    """What a score is part of: the mass it names, the folder of its movements, or itself."""
    if source.suffix == ".krn":
        named = re.search(r"^!!!OPR:\s*(.+?)\s*$", (root / source).read_text("latin-1"), re.MULTILINE)
        if named:
            return named[1]
    return (source.parent if len(source.parts) > 2 else source.with_suffix("")).as_posix()


def _package(name):
    """The folder of an installed package, found without importing it."""
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


# ---- scores to notes

NOTE = np.dtype([("onset", float), ("length", float), ("part", int), ("pitch", int)])  # quarter notes; MIDI pitch


class Unplayable(Exception):
    """A score that can't be read, or that is left out; the message says why."""


@dataclass(frozen=True)
class Score:
    """What is written: `notes` (n,) of dtype NOTE by onset; `beats` (m,) and `tempo` in quarter notes (a minute)."""

    title: str
    composer: str
    tempo: float | None
    notes: np.ndarray
    beats: np.ndarray

    def until(self, end):
        """The score up to a time in quarter notes."""
        notes = self.notes[self.notes["onset"] < end]
        notes["length"] = np.minimum(notes["length"], end - notes["onset"])
        notes["part"] = _renumber(notes["part"])
        return replace(self, notes=notes)


def read_score(piece):
    """Parse a score of music21's corpus.

    Parameters
    ----------
    piece : Piece

    Returns
    -------
    Score
        `beats` are those on which a note begins.

    Raises
    ------
    Unplayable
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an encoder's slips, which music21 mends
        try:
            score = _parse(_package("music21") / "corpus" / piece.source)
            notes = [note for number, part in enumerate(score.parts) for note in _notes(part, number)]
            beats = _beats(score.parts[0])
            tempo = _tempo_mark(score)
        except Unplayable:
            raise
        except Exception as error:  # music21 raises whatever a malformed score leads to
            raise Unplayable(f"music21 can't read it ({type(error).__name__})") from error
    notes = np.array(notes, NOTE)
    _check(notes)
    notes["part"] = _renumber(notes["part"]) % _CHANNELS
    notes = _struck_once(notes)
    begun = np.isin(beats.round(3), notes["onset"].round(3))
    return Score(_title(piece), piece.composer or _composer(score), tempo, notes, beats[begun])


def _parse(path):
    from music21 import converter, stream

    score = converter.parse(path, forceSource=True, storePickle=False)
    if isinstance(score, stream.Opus):  # each voice a score of its own
        score = score.mergeScores()
    if any(i.transposition and i.transposition.semitones % 12 for i in score.recurse().getElementsByClass("Instrument")):
        raise Unplayable("is written for transposing instruments")
    return score


def _notes(part, number):
    """The notes of a part as NOTE, tied ones joined."""
    from music21 import harmony

    notes, tied = [], {}
    for element in part.flatten().notes:
        if isinstance(element, harmony.Harmony) or not element.quarterLength:  # chord symbols and grace notes
            continue
        onset, length = float(element.offset), float(element.quarterLength)
        for note in element.notes if element.isChord else [element]:
            if not hasattr(note, "pitch"):  # unpitched percussion
                continue
            pitch, tie = note.pitch.midi, note.tie.type if note.tie else None
            before = tied.pop(pitch, None)
            if before is not None and tie in ("stop", "continue") and abs(sum(notes[before][:2]) - onset) < 1e-3:
                notes[before] = (notes[before][0], onset + length - notes[before][0], number, pitch)
            else:
                before = len(notes)
                notes.append((onset, length, number, pitch))
            if tie in ("start", "continue"):
                tied[pitch] = before
    return notes


def _beats(part):
    """Offsets of the beats of a part's measures, as the time signatures count them, in quarter notes: float64 (n,)."""
    beats, step = [np.zeros(0)], 1.0
    for measure in part.getElementsByClass("Measure"):
        if measure.timeSignature is not None:
            step = float(measure.timeSignature.beatDuration.quarterLength)
        upbeat = -float(measure.paddingLeft) % step
        beats.append(float(measure.offset) + np.arange(upbeat, float(measure.duration.quarterLength) - 1e-3, step))
    return np.concatenate(beats)


def _struck_once(notes):
    """The notes by onset; of equal pitches that begin together in one part only the longest: a channel has one key for them."""
    notes = np.sort(notes, order=["onset", "part", "pitch", "length"])
    differ = [notes[field][1:] != notes[field][:-1] for field in ("onset", "part", "pitch")]
    return notes[np.append(np.any(differ, axis=0), True)]


def _renumber(parts):
    """Numbers of parts without gaps: a part may be silent throughout."""
    return np.unique(parts, return_inverse=True)[1]


def _tempo_mark(score):
    """The first metronome mark in quarter notes a minute, or None."""
    for mark in score.recurse().getElementsByClass("MetronomeMark"):
        tempo = mark.getQuarterBPM() if mark.number else None
        if tempo and 40 <= tempo <= 200:
            return float(tempo)
    return None


def _check(notes):
    if len(notes) < 20:
        raise Unplayable("has fewer than 20 notes")
    lowest, highest = notes["pitch"].min(), notes["pitch"].max()
    if lowest < _RANGE[0] or highest > _RANGE[1]:
        raise Unplayable(f"goes from MIDI pitch {lowest} to {highest}, beyond {_RANGE[0]} to {_RANGE[1]}")


def _title(piece):
    """Where the score stands: what it says of itself is too often the name of a voice or of a file."""
    place = piece.source.rpartition(".")[0].replace("_", " ").split("/")[1:]
    named_by_score = piece.work not in piece.source
    return ", ".join([piece.work] * named_by_score + place)


def _composer(score):
    named = score.metadata.composer if score.metadata else None
    return named.splitlines()[0].strip() if named else "anonymous"


def arrange(notes, rng):
    """The notes as in a setting of wider range: outer parts doubled in octaves or moved outwards by one, all of it an octave up or down.

    Music for voices keeps to the middle of the keyboard; a pianist does not.

    Parameters
    ----------
    notes : ndarray of NOTE, shape (n,)
    rng : numpy.random.Generator

    Returns
    -------
    ndarray of NOTE, shape (m,)
        By onset. What would take a note beyond the pitches that a score may hold is not done.
    """
    heights = [notes["pitch"][notes["part"] == part].mean() for part in range(notes["part"].max() + 1)]
    if len(heights) > 1:
        lowest, *_, highest = np.argsort(heights, kind="stable")
        for part, octave in ((lowest, -12), (highest, 12)):
            notes = _set_outwards(notes, part, octave, rng.choice(["as written", "doubled", "moved"], p=_OUTWARDS))
    notes = _moved(notes, int(rng.choice([-12, 0, 12], p=_REGISTERS)))
    return _struck_once(notes)


def _set_outwards(notes, part, octave, how):
    """The notes with those of a part `octave` semitones away besides ("doubled"), instead ("moved") or not at all ("as written")."""
    own = notes["part"] == part
    if how == "as written":
        return notes
    return np.concatenate([notes if how == "doubled" else notes[~own], _moved(notes[own], octave)])


def _moved(notes, semitones):
    """The notes transposed if all stay among the pitches that a score may hold, and as they are if not."""
    moved = notes.copy()
    moved["pitch"] += semitones
    return moved if _RANGE[0] <= moved["pitch"].min() and moved["pitch"].max() <= _RANGE[1] else notes


# ---- notes to a performance


@dataclass(frozen=True)
class Manner:
    """How freely a player plays.

    Spreads (standard deviations) of the tempo (as a ratio), of onsets (s), and of MIDI velocities in their slow course and from
    note to note; how much slower the last bar ends (a share); for which shares of their length notes are held.
    """

    rubato: float
    jitter: float
    dynamics: float
    accents: float
    slowing: float
    held: tuple


STEADY = Manner(rubato=0.03, jitter=0.0, dynamics=5.0, accents=3.0, slowing=0.2, held=(0.93, 0.99))
HUMAN = Manner(rubato=0.1, jitter=0.012, dynamics=10.0, accents=6.0, slowing=0.35, held=(0.8, 1.0))


@dataclass(frozen=True)
class Performance:
    """When and how loudly each note of a score sounds.

    `onsets`, `ends` (n,) in s and `velocities` (n,) belong to the notes; `quarters`, `seconds` (m,) are the course of time.
    """

    onsets: np.ndarray
    ends: np.ndarray
    velocities: np.ndarray
    quarters: np.ndarray
    seconds: np.ndarray

    @property
    def duration(self):
        """Length in s with the last sounds' decay."""
        return round(float(self.ends.max()) + _TAIL, 3)

    def times(self, quarters):
        """Times in s of offsets in quarter notes."""
        return np.interp(quarters, self.quarters, self.seconds)

    def quarters_at(self, seconds):
        """Offsets in quarter notes at times in s."""
        return np.interp(seconds, self.seconds, self.quarters)


def perform(notes, tempo, manner, rng):
    """Play notes as a player would, with a smooth course of tempo that slows down at the end.

    Parameters
    ----------
    notes : ndarray of NOTE, shape (n,)
    tempo : float
        Quarter notes a minute.
    manner : Manner
    rng : numpy.random.Generator

    Returns
    -------
    Performance
    """
    step, end = 0.25, (notes["onset"] + notes["length"]).max()
    quarters = np.arange(0, end + 2 * step, step)
    rate = tempo * np.exp(manner.rubato * _wander(quarters, rng))
    rate *= 1 - manner.slowing * np.clip((quarters - end + 4) / 4, 0, 1) ** 2
    seconds = _LEAD_IN + np.concatenate([[0], np.cumsum(60 / rate[:-1] * step)])

    written = np.interp(notes["onset"], quarters, seconds)
    until = np.interp(notes["onset"] + notes["length"], quarters, seconds)
    onsets = written + manner.jitter * rng.standard_normal(len(notes)).clip(-2.5, 2.5)
    ends = onsets + np.maximum(0.05, (until - written) * rng.uniform(*manner.held, len(notes)))
    loudness = 82 + manner.dynamics * _wander(notes["onset"], rng) + manner.accents * rng.standard_normal(len(notes))
    return Performance(onsets, ends, loudness.clip(36, 118).round().astype(int), quarters, seconds)


def by_hand(notes, played, programs, rng):
    """The same onsets in another loudness, and with the pedal where sounds decay.

    Parameters
    ----------
    notes : ndarray of NOTE, shape (n,)
    played : Performance
    programs : tuple of int
        General MIDI programs from 0, one a part.
    rng : numpy.random.Generator

    Returns
    -------
    Performance
    """
    level, course, accents = rng.uniform(55, 90), rng.uniform(3, 16), rng.uniform(3, 14)
    if notes["part"].any():
        balance = rng.normal(0, 8, _CHANNELS)[notes["part"]]
    else:  # one hand louder than the other
        balance = ((notes["pitch"] - 60) * rng.uniform(-0.2, 0.5)).clip(-15, 15)
    loudness = level + balance + course * _wander(notes["onset"], rng) + accents * rng.standard_normal(len(notes))
    decays = np.isin(np.array(programs)[notes["part"]], DECAYING)
    ends = np.where(decays, _under_pedal(notes, played, rng), played.ends)
    return replace(played, ends=ends, velocities=loudness.clip(20, 124).round().astype(int))


def _under_pedal(notes, played, rng):
    """When notes end if the pedal is changed every one, two or four quarters, just after the beat, and seldom left out: (n,) in s."""
    span = float(rng.choice([1, 2, 2, 4]))
    number = np.floor(notes["onset"] / span + 1e-6).astype(int)
    down = rng.random(number.max() + 1) < 0.85
    lifted = played.times(np.ceil(played.quarters_at(played.ends) / span - 1e-6) * span) + rng.uniform(0.02, 0.12)
    lifted = np.minimum(lifted, played.ends.max())  # views are equally long
    return np.where(down[number], np.maximum(played.ends, lifted), played.ends)


def _wander(x, rng):
    """A smooth curve over x (quarter notes) of unit variance, with periods of a bar or two up to a section: float64 (n,)."""
    periods, phases = np.exp(rng.uniform(np.log(6), np.log(64), 4)), rng.random(4)
    return np.sin(2 * np.pi * (x[:, None] / periods + phases)).sum(axis=1) / np.sqrt(2)


# ---- a performance to sound


@dataclass(frozen=True)
class Take:
    """One recording: a performance, the General MIDI program of each part, and a transposition in semitones."""

    performance: Performance
    programs: tuple
    k: int


def reaching(pitches, shifts):
    """The sounds that have all the pitches in all the transpositions, by family.

    Parameters
    ----------
    pitches : ndarray of int, shape (n,)
        MIDI pitches.
    shifts : sequence of int
        In semitones.

    Returns
    -------
    dict of str to list of int
        General MIDI programs from 0; families that have none are left out.
    """
    lowest, highest = pitches.min() + min(shifts), pitches.max() + max(shifts)
    sounds = {}
    for family, programs in FAMILIES.items():
        for program in programs:
            bottom, top = COMPASSES.get(program, COMPASS)
            if bottom <= lowest and highest <= top:
                sounds.setdefault(family, []).append(program)
    return sounds


def draw_families(notes, shifts, rng):
    """All families with a sound for all the notes (of NOTE) in all the transpositions, in random order: list of str."""
    families = list(reaching(notes["pitch"], shifts))
    shares = np.array([FAMILY_SHARES.get(family, 1.0) for family in families])
    return rng.choice(families, len(families), replace=False, p=shares / shares.sum()).tolist()


def draw_programs(family, notes, shifts, rng):
    """Choose a sound for each part: one for all, several of one family, or mixed with others.

    Parameters
    ----------
    family : str
        The first part's, one of `draw_families`; a piano plays all the parts.
    notes : ndarray of NOTE, shape (n,)
    shifts : sequence of int
        Transpositions that the sounds must reach, in semitones.
    rng : numpy.random.Generator

    Returns
    -------
    tuple of int
        General MIDI programs from 0, one a part.
    """
    parts = [notes["pitch"][notes["part"] == part] for part in range(notes["part"].max() + 1)]
    scoring = rng.choice(["one", "family", "mixed"], p=[0.5, 0.25, 0.25])
    if scoring == "one" or family == "piano":
        return (int(rng.choice(reaching(notes["pitch"], shifts)[family])),) * len(parts)
    sounds = [reaching(pitches, shifts) for pitches in parts]
    families = [family] + [rng.choice(list(own)) if scoring == "mixed" else family for own in sounds[1:]]
    return tuple(int(rng.choice(own[name])) for own, name in zip(sounds, families, strict=True))


def synthesise(notes, take, duration, soundfont=None):
    """Play a take.

    Parameters
    ----------
    notes : ndarray of NOTE, shape (n,)
    take : Take
    duration : float
        Length in s.
    soundfont : bytes, optional
        That of pretty_midi unless given.

    Returns
    -------
    ndarray of float32, shape (round(duration * SAMPLE_RATE),)
        Mono, with a peak of 0.8.
    """
    import midirenderer

    wave = midirenderer.render_wave_from(soundfont or _soundfont(), _midi(notes, take, duration))
    samples, rate = soundfile.read(io.BytesIO(wave), dtype="float32")
    samples = soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE)
    count = round(duration * SAMPLE_RATE)
    samples = np.pad(samples, (0, max(0, count - len(samples))))[:count]
    peak = np.abs(samples).max()
    if peak < 1e-3:
        raise Unplayable("is silent")
    return samples * np.float32(_PEAK / peak)


@functools.cache
def _soundfont():
    return (_package("pretty_midi") / "TimGM6mb.sf2").read_bytes()


def _midi(notes, take, duration):
    """A take as the bytes of a MIDI file, one channel a part, to the millisecond."""
    import pretty_midi

    midi = pretty_midi.PrettyMIDI(resolution=1000, initial_tempo=60)
    midi.instruments = [pretty_midi.Instrument(program) for program in take.programs]
    played = take.performance
    for note, onset, end, velocity in zip(notes, played.onsets, played.ends, played.velocities, strict=True):
        midi.instruments[note["part"]].notes.append(pretty_midi.Note(int(velocity), int(note["pitch"]) + take.k, onset, end))
    for instrument in midi.instruments:
        _separate(instrument.notes)
    # the synthesiser stops at the last event: a pedal that was never down keeps it listening to the decay
    midi.instruments[0].control_changes.append(pretty_midi.ControlChange(64, 0, duration))
    file = io.BytesIO()
    midi.write(file)
    return file.getvalue()


def _separate(notes, gap=0.005):
    """End a note before its key is struck again: one that sounds on would swallow the next."""
    sounding = {}
    for note in sorted(notes, key=lambda note: note.start):
        before = sounding.get(note.pitch)
        if before is not None:
            before.end = min(before.end, max(before.start + gap, note.start - gap))
        sounding[note.pitch] = note


# ---- a piece to files


def render_piece(piece, split, lead, folder, params):
    """Render the takes of a piece, unless they are there: the unit of work.

    Parameters
    ----------
    piece : Piece
    split : str
        "train" or "heldout".
    lead : str or None
        Family of the first take's sounds; None draws one.
    folder : Path
        Where the files go; it appears whole or not at all.
    params : gae.params.Corpus

    Returns
    -------
    dict
        What is in the folder, as ``piece.json`` there has it, or ``{"id": ..., "left_out": reason}``.
    """
    spec = _spec(piece, split, lead, params)
    if (report := _kept(folder, spec)) is not None:
        return report
    try:
        report, audio = _render(piece, split, lead, params)
    except Unplayable as reason:
        return {"id": piece.id, "left_out": str(reason)}
    encoded = {f"{name}.flac": _encode(samples) for name, samples in audio.items()}
    report |= {"spec": spec, "files": {name: hashlib.sha256(data).hexdigest() for name, data in encoded.items()}}
    _write_folder(folder, report, encoded)
    return report


def _kept(folder, spec):
    """The report on a piece whose files are just those that would be written, or None."""
    try:
        report = read_json(folder / "piece.json")
        whole = report["spec"] == spec and all(content_hash(folder / name) == wanted for name, wanted in report["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return report if whole else None


def _spec(piece, split, lead, params):
    """Digest of all that decides how a piece sounds: this code and its packages among it."""
    asked = [params.views, params.view_transposition, params.human, params.arranged] if split == "train" else []
    return digest([asdict(piece), split, lead, params.seed, asked, code_digest(["corpus"], _PLAYERS)])


def _render(piece, split, lead, params):
    """Report on a piece, and its recordings as a dictionary of name to samples."""
    score = read_score(piece)
    rng = np.random.default_rng([params.seed, zlib.crc32(piece.id.encode())])
    hand, arranger = rng.spawn(2)  # draws of their own: what people do changes nothing else
    tempo = (score.tempo or rng.uniform(*piece.tempo)) * np.exp(0.05 * rng.standard_normal())
    score = score.until((_SECONDS[1] - 2 * _TAIL) * tempo / 60)
    if split == "train" and arranger.random() < params.arranged:
        score = replace(score, notes=arrange(score.notes, arranger))
    played = perform(score.notes, tempo, HUMAN if split == "train" and hand.random() < params.human else STEADY, rng)
    if played.duration < _SECONDS[0]:
        raise Unplayable(f"lasts {played.duration:.0f} s only")
    report = {
        **{name: getattr(piece, name) for name in ("id", "kind", "work", "source")},
        **{"title": score.title, "composer": score.composer, "split": split, "duration_s": played.duration},
        "melodies": _melodies(score.notes),
    }
    if split == "train":
        takes = _views(score, played, params, rng, hand)
    else:
        takes = _evaluation_takes(score, played, tempo, lead, rng)
        report["k"] = takes["transposed"].k
        report["beats"] = _beat_times(score, played, takes["performance"].performance)
    report["sounds"] = {name: _sounds(take) for name, take in takes.items()}
    return report, {name: synthesise(score.notes, take, take.performance.duration) for name, take in takes.items()}


def _views(score, played, params, rng, hand):
    """The takes of a training piece: one performance in other sounds, the first in the written key, a share of them by hand."""
    n, pitches = params.view_transposition, score.notes["pitch"]
    lowest, highest = max(-n, COMPASS[0] - pitches.min()), min(n, COMPASS[1] - pitches.max())
    shifts = [0, *rng.integers(lowest, highest + 1, params.views - 1).tolist()]
    families, takes = itertools.cycle(draw_families(score.notes, shifts, rng)), {}
    for number, (family, k) in enumerate(zip(families, shifts, strict=False), start=1):
        programs = draw_programs(family, score.notes, shifts, rng)
        own = by_hand(score.notes, played, programs, hand) if hand.random() < params.human else played
        takes[str(number)] = Take(own, programs, k)
    return takes


def _evaluation_takes(score, steady, tempo, lead, rng):
    """The takes of a held-out piece: as written, transposed, and another performance in another sound."""
    k = int(rng.choice([k for k in range(-HELDOUT_SHIFT, HELDOUT_SHIFT + 1) if k]))
    families = draw_families(score.notes, [0, k], rng)
    lead = lead or next(family for family in families if family != "piano")
    other = next(family for family in families if family != lead)
    programs = draw_programs(lead, score.notes, [0, k], rng)
    human = perform(score.notes, tempo * np.exp(0.12 * np.clip(rng.standard_normal(), -2, 2)), HUMAN, rng)
    return {
        "original": Take(steady, programs, 0),
        "transposed": Take(steady, programs, k),
        "performance": Take(human, draw_programs(other, score.notes, [0], rng), 0),
    }


def _beat_times(score, steady, human):
    """Times in s of the same beats in the score's rendering and in the performance."""
    beats = score.beats[score.beats <= score.notes["onset"].max()]
    return {"score": steady.times(beats).round(4).tolist(), "performance": human.times(beats).round(4).tolist()}


def _sounds(take):
    from pretty_midi import program_to_instrument_name

    return {"k": take.k, "programs": list(take.programs), "names": [program_to_instrument_name(program) for program in take.programs]}


def _encode(samples):
    """Samples as the bytes of a flac file; libsndfile itself does not always notice that a disk is full."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _write_folder(folder, report, files):
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, data in files.items():
        (partial / name).write_bytes(data)
    write_json(partial / "piece.json", report)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


# ---- which pieces


def render_corpus(out, params, compute):
    """Render as much music as the parameters ask for, and describe it in ``corpus.json``.

    What an earlier run left is kept where it is still right, and removed where not.

    Parameters
    ----------
    out : Path
        Folder for ``train/<piece>/<view>.flac``, ``heldout/<piece>/{original,transposed,performance}.flac`` and ``corpus.json``.
    params : gae.params.Corpus
    compute : gae.params.Compute

    Returns
    -------
    dict
        As ``corpus.json``: ``pieces``, and ``left_out`` with the reasons.

    Raises
    ------
    ParamsError
        If there is less music than asked for.
    """
    out, pieces, heldout, train = Path(out), catalogue(), [], []
    compute = beside_files(compute)
    with submitting(compute) as submit:
        ahead = 2 * (compute.workers or n_cores())
        reports = _in_order(submit, _jobs("heldout", _heldout_candidates(pieces, params.seed), out, params), ahead)
        left_out = _gather(reports, heldout, heldout, params.heldout, lambda report: 1, "held-out pieces")

        works = {report["work"] for report in heldout}
        candidates = [piece for piece in _training_candidates(pieces, params.seed) if piece.work not in works]
        reports = _in_order(submit, _jobs("train", [(piece, None) for piece in candidates], out, params), ahead)
        minutes = round(params.hours * 60, 3)
        left_out += _gather(reports, train, heldout, minutes, lambda report: report["duration_s"] / 60, "minutes of music")
    _keep_only(out, heldout + train)
    described = [{key: value for key, value in report.items() if key not in ("melodies", "spec", "files")} for report in heldout + train]
    index = {"pieces": described, "left_out": left_out}
    write_json(out / "corpus.json", index)
    return index


def _heldout_candidates(pieces, seed):
    """One piece of each work, kind by kind, every other one to be played on the piano: pairs of piece and family."""
    order = _interleave(pieces, np.random.default_rng([seed, 0]), lambda kind: 1)
    first_of_work = {piece.work: piece for piece in reversed(order)}
    once = [piece for piece in order if first_of_work[piece.work] is piece]
    return [(piece, None if number % 2 else "piano") for number, piece in enumerate(once)]


def _training_candidates(pieces, seed):
    return _interleave(pieces, np.random.default_rng([seed, 1]), lambda kind: kind.share)


def _interleave(pieces, rng, share):
    """The pieces in random order such that every beginning holds the kinds in their shares, as far as they reach."""
    ranked = []
    for kind in KINDS:
        own = [piece for piece in pieces if piece.kind == kind.name]
        ranks = (rng.permutation(len(own)) + rng.random(len(own))) / share(kind)
        ranked += zip(ranks, own, strict=True)
    return [piece for _, piece in sorted(ranked, key=lambda pair: pair[0])]


def _jobs(split, candidates, out, params):
    return [(piece, split, lead, out / split / piece.id, params) for piece, lead in candidates]


def _in_order(submit, jobs, ahead):
    """Yield the reports of `render_piece` in the order of the jobs, with some more jobs under way."""
    waiting = deque()
    try:
        for job in jobs:
            waiting.append(submit(render_piece, *job))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except GeneratorExit:  # nobody wants more
        wait(waiting)  # Dask's workers end what they have begun: not after the folder was cleared up
        raise
    finally:
        for future in waiting:
            future.cancel()


def _gather(reports, chosen, rivals, goal, size, label):
    """Add reports to `chosen` until their sizes reach the goal.

    Returns what was left out, with reasons: what can't be played, and what resembles one of the `rivals`.
    """
    left_out, total = [], 0
    with closing(reports), tqdm(total=goal, desc=f"corpus: {label}", unit="", mininterval=0.5) as bar:
        for report in reports:
            reason = report.get("left_out") or _resemblance(report, rivals)
            if reason:
                left_out.append({"id": report["id"], "reason": reason})
                continue
            chosen.append(report)
            total += size(report)
            bar.update(min(goal, round(total)) - bar.n)  # whole numbers read better
            if total >= goal:
                return left_out
    raise ParamsError(f"corpus: {goal:g} {label} asked for, but the scores give only {total:.0f}; lower corpus.hours or corpus.heldout")


def _resemblance(report, rivals):
    """Why a piece is too much like one that is held out, or None."""
    for rival in rivals:
        if any(_alike(own, other) for own in report["melodies"] for other in rival["melodies"]):
            return f"has a melody of {rival['id']}"
    return None


def _alike(melody, other):
    """Whether two melodies share too many phrases, in whatever keys and rhythms."""
    mine, theirs = _phrases(melody), _phrases(other)
    return len(mine & theirs) > _ALIKE * max(_FEW, min(len(mine), len(theirs)))


def _phrases(melody):
    return {tuple(melody[start : start + _PHRASE]) for start in range(len(melody) - _PHRASE + 1)}


def _melodies(notes):
    """The steps of each part's upper voice in semitones, without repeated notes: list of lists of int."""
    return [_steps(notes[notes["part"] == part]) for part in range(notes["part"].max() + 1)]


def _steps(notes):
    begins = np.unique(notes["onset"], return_index=True)[1]
    steps = np.diff(np.maximum.reduceat(notes["pitch"], begins))
    return steps[steps != 0].tolist()


def _keep_only(out, reports):
    """Remove the folders of pieces that are not, or no longer, chosen, and what is half-written."""
    sweep(out)
    kept = {out / report["split"] / report["id"] for report in reports}
    for folder in [*out.glob("train/*"), *out.glob("heldout/*")]:
        ours = (folder / "piece.json").exists() or re.fullmatch(r"\..+\.partial", folder.name)
        if ours and folder not in kept:
            shutil.rmtree(folder)
