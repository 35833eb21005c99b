"""Notes to sound: a seeded performance gives every note its time and its loudness, and a synthesiser plays it in several takes."""

import functools
import io
from dataclasses import dataclass, replace

import numpy as np
import soundfile
import soxr

from gae.scores import CHANNELS, Unplayable, package

SAMPLE_RATE = 22_050  # Hz
TAIL = 1.0  # s after the last note
_LEAD_IN = 0.25  # s before the first note
_PEAK = 0.8  # of full scale

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
FREE = replace(HUMAN, rubato=0.2)


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
        return round(float(self.ends.max()) + TAIL, 3)

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
        balance = rng.normal(0, 8, CHANNELS)[notes["part"]]
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
    lag = rng.uniform(0.02, 0.12)
    lifted = played.times(np.ceil(played.quarters_at(played.ends - lag) / span - 1e-6) * span) + lag
    lifted = np.minimum(lifted, played.ends.max())  # views are equally long
    return np.where(down[number], np.maximum(played.ends, lifted), played.ends)


def _wander(x, rng):
    """A smooth curve over x (quarter notes) of unit variance, with periods of a bar or two up to a section: float64 (n,)."""
    periods, phases = np.exp(rng.uniform(np.log(6), np.log(64), 4)), rng.random(4)
    return np.sin(2 * np.pi * (x[:, None] / periods + phases)).sum(axis=1) / np.sqrt(2)


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
    return (package("pretty_midi") / "TimGM6mb.sf2").read_bytes()


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
