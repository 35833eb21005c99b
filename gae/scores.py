"""The scores of the built-in music: which kinds there are, how a score that music21 ships is read, and how it is arranged.

Repeat signs, ornaments and grace notes are not played.
"""

import importlib.util
import re
import warnings
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

NOTE = np.dtype([("onset", float), ("length", float), ("part", int), ("pitch", int)])  # quarter notes; MIDI pitch
CHANNELS = 15  # parts that sound at once: the 16 of MIDI without the drums
_RANGE = (27, 102)  # MIDI pitches that a score may hold
_OUTWARDS, _REGISTERS = (0.3, 0.4, 0.3), (0.15, 0.55, 0.3)  # of arranged pieces: shares of what becomes of an outer part, and of all


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
    pieces, root = [], package("music21") / "corpus"
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


def package(name):
    """The folder of an installed package, found without importing it."""
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


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
            score = _parse(package("music21") / "corpus" / piece.source)
            notes = [note for number, part in enumerate(score.parts) for note in _notes(part, number)]
            beats = _beats(score.parts[0])
            tempo = _tempo_mark(score)
        except Unplayable:
            raise
        except Exception as error:  # music21 raises whatever a malformed score leads to
            raise Unplayable(f"music21 can't read it ({type(error).__name__})") from error
    notes = np.array(notes, NOTE)
    _check(notes)
    notes["part"] = _renumber(notes["part"]) % CHANNELS
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
    _begin_together(list(score.parts))
    return score


def _begin_together(parts):
    """Move the measures of a score's parts so that the first of all begin together, and the second, and so on.

    Encoders let a measure be too long, by two whole rests for one, or too short: all that follows in its part is then late or
    early. It lasts as long as in the part where it is shortest, or as the notes of any.
    """
    measures = [list(part.getElementsByClass("Measure")) for part in parts]
    if all(len({measure.offset for measure in together}) == 1 for together in zip(*measures, strict=False)):
        return
    lengths, start = list(map(_lengths, measures)), 0.0
    for number in range(max(map(len, measures))):
        there = [n for n, own in enumerate(measures) if number < len(own)]
        for n in there:
            parts[n].setElementOffset(measures[n][number], start)
        notes = [note for n in there for note in measures[n][number].flatten().notes]
        start += max([min(lengths[n][number] for n in there), *(note.offset + note.quarterLength for note in notes)])


def _lengths(measures):
    """The time from each measure of a part to the next, in quarter notes."""
    if not measures:
        return []
    end = measures[-1].offset + measures[-1].duration.quarterLength
    return [after - before for before, after in pairwise([*(measure.offset for measure in measures), end])]


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
            if before is not None and abs(sum(notes[before][:2]) - onset) < 1e-3:  # not all encoders say where a tie ends
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
    measures = list(part.getElementsByClass("Measure"))
    for measure, length in zip(measures, _lengths(measures), strict=True):
        if measure.timeSignature is not None:
            step = float(measure.timeSignature.beatDuration.quarterLength)
        upbeat = -float(measure.paddingLeft) % step
        beats.append(float(measure.offset) + np.arange(upbeat, float(length) - 1e-3, step))
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
