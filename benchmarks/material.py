"""Music-like audio for benchmarks, made on the fly: chords of decaying harmonics over a little noise."""

from pathlib import Path

import numpy as np
import soundfile


def tones(seconds, sample_rate, seed):
    """Mono samples, float32: a new chord every 0.3 s, each of three notes with six harmonics."""
    rng = np.random.default_rng(seed)
    length = int(0.3 * sample_rate)
    time = np.arange(length) / sample_rate
    chords = []
    for _ in range(int(np.ceil(seconds / 0.3))):
        pitches = 110 * 2 ** (rng.integers(0, 36, 3) / 12)
        partials = np.outer(pitches, np.arange(1, 7)).ravel()
        waves = np.sin(2 * np.pi * partials[:, None] * time) / np.tile(np.arange(1, 7), 3)[:, None]
        chords.append(waves.sum(0) * np.exp(-4 * time))
    samples = np.concatenate(chords)[: int(seconds * sample_rate)]
    return (0.1 * samples + 0.001 * rng.standard_normal(len(samples))).astype(np.float32)


def write_music(folder, count, seconds, sample_rate, suffix, channels=1):
    """Write `count` different files and return their paths. One minute is made and repeated: the codecs don't mind."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        minute = np.repeat(tones(60, sample_rate, number)[:, None], channels, axis=1)
        path = folder / f"{number:04d}.{suffix}"
        with soundfile.SoundFile(path, "w", sample_rate, channels) as file:
            for second in range(round(seconds)):  # libsndfile's Vorbis encoder can't take a whole recording at once
                file.write(minute[second % 60 * sample_rate :][:sample_rate])
        paths.append(path)
    return paths
