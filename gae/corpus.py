"""The built-in demo music: scores that music21 ships, played with the SoundFont that pretty_midi ships.

A score is read into notes (`gae.scores`) and played in several takes (`gae.synthesis`). For training these are *views*: one
performance in other sounds and keys, equal in timing, some as a person would play it: freer in time, each view in a loudness of its
own, with the pedal where sounds decay. Some of the pieces are arranged: with outer parts in octaves, or in another register. For
evaluation a piece is played as written, the same transposed, and once more as another player would in another sound.
"""

import hashlib
import io
import math
import re
import shutil
import zlib
from collections import deque
from concurrent.futures import wait
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from gae.compute import beside_files, n_cores, runs_here, submitting
from gae.errors import ParamsError
from gae.files import beside, code_digest, content_hash, digest, link, read_json, remove_own, sweep, write_json
from gae.locks import alone
from gae.scores import KINDS, Unplayable, arrange, catalogue, read_score
from gae.synthesis import COMPASS, FREE, HUMAN, SAMPLE_RATE, STEADY, TAIL, Take, by_hand, draw_families, draw_programs, perform, synthesise

OTHER_TEMPI = (0.7, 1.4)  # times the score's, in which another player plays a held-out piece
_HELDOUT_SHIFT = 6  # semitones: a held-out piece is transposed by at most this
_PRIVATE = ("melodies", "spec", "files")  # of a report: what corpus.json does not have
_PLAYERS = ("music21", "midirenderer", "mido", "numpy", "pretty_midi", "soundfile", "soxr")  # packages that decide how a piece sounds
_SECONDS = (20.0, 210.0)  # shorter pieces are left out, longer ones end early
# Of two unrelated chorales at most 0.3 of the phrases agree, of two harmonisations of one melody as a rule 0.35 to 1.
_PHRASE, _ALIKE, _FEW = 8, 0.3, 20  # intervals in a phrase; that share; fewer phrases than these count as these


# ---- which pieces


def render_corpus(params, out):
    """Render as much music as the parameters ask for, and describe it in ``corpus.json``.

    What an earlier run left is kept where it is still right, and removed where not.

    Parameters
    ----------
    params : gae.params.Params
        Reads corpus and compute.
    out : Path
        Folder for ``train/<piece>/<view>.flac``, ``heldout/<piece>/{original,transposed,performance}.flac`` and ``corpus.json``.

    Returns
    -------
    dict
        As ``corpus.json``: ``pieces``, and ``left_out`` with the reasons.

    Raises
    ------
    ParamsError
        If there is less music than asked for.
    GaeError
        If another process writes into the folder.
    """
    out = Path(out)
    with alone(out):
        heldout, train, left_out = _render_corpus(params.corpus, beside_files(params.compute), out)
        _keep_only(out, heldout + train)
        described = [{key: value for key, value in report.items() if key not in _PRIVATE} for report in heldout + train]
        index = {"pieces": described, "left_out": left_out}
        write_json(out / "corpus.json", index)
        remove_own(beside(out), "train|heldout")
    return index


def _render_corpus(params, compute, out):
    """Reports on the held-out pieces and those to train on, and what was left out, with reasons."""
    pieces, heldout, train = catalogue(), [], []
    with submitting(compute) as submit:
        gather = partial(_gather, partial(_in_order, submit, runs_here(compute)), 1 + 2 * (compute.workers or n_cores()))
        jobs = _jobs("heldout", _heldout_candidates(pieces, params.seed), out, params)
        left_out = gather(jobs, heldout, heldout, params.heldout, "held-out pieces", size=lambda report: 1, least=1)

        works = {report["work"] for report in heldout}
        candidates = [piece for piece in _training_candidates(pieces, params.seed) if piece.work not in works]
        jobs = _jobs("train", [(piece, None) for piece in candidates], out, params)
        goal, minutes = round(params.hours * 60, 3), lambda report: report["duration_s"] / 60
        left_out += gather(jobs, train, heldout, goal, "minutes of music", size=minutes, least=_SECONDS[0] / 60)
    return heldout, train, left_out


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


def _in_order(submit, here, jobs, wanted):
    """Yield the reports of `render_piece` in the order of the jobs, with as many under way as `wanted()` says."""
    jobs, waiting = iter(jobs), deque()
    try:
        while True:
            waiting.extend(submit(render_piece, *job) for job in islice(jobs, max(0, wanted() - len(waiting))))
            if not waiting:
                return
            yield waiting.popleft().result()
    except GeneratorExit:  # nobody wants more
        # what has begun ends before the folder is cleared up; of Dask's work nobody can tell whether it has
        wait([future for future in waiting if not (here and future.cancel())])
        raise
    finally:
        for future in waiting:
            future.cancel()


def _gather(rendered, most, jobs, chosen, rivals, goal, label, size, least):
    """Add reports to `chosen` until their sizes, `least` or more each, reach the goal.

    `rendered` is `_in_order` with its first arguments. Up to `most` jobs are under way, and no more than can be wanted.

    Returns what was left out, with reasons: what can't be played, and what resembles one of the `rivals`.
    """
    left_out, total = [], 0
    reports = rendered(jobs, lambda: min(most, math.ceil((goal - total) / least)))
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


# ---- a piece to files


def render_piece(piece, split, lead, folder, params):
    """Render the takes of a piece, unless they are there or wait beside: the unit of work.

    Parameters
    ----------
    piece : Piece
    split : str
        "train" or "heldout".
    lead : str or None
        Family of the first take's sounds; None draws one.
    folder : Path
        Where the files go, <out>/<split>/<piece>; it appears whole or not at all.
    params : gae.params.Corpus

    Returns
    -------
    dict
        What is in the folder, as ``piece.json`` there has it, or ``{"id": ..., "left_out": reason}``.
    """
    spec, waiting = _spec(piece, split, lead, params), beside(folder.parents[1]) / folder.parent.name / folder.name
    if (report := _kept(folder, spec)) is not None:
        return report
    if (report := _kept(waiting, spec)) is not None:
        with suppress(FileNotFoundError):  # the same by a worker that was believed dead
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            waiting.rename(folder)
            link(folder, waiting)
            return report
    try:
        report, audio = _render(piece, split, lead, params)
    except Unplayable as reason:
        return {"id": piece.id, "left_out": str(reason)}
    encoded = {f"{name}.flac": _encode(samples) for name, samples in audio.items()}
    report |= {"spec": spec, "files": {name: hashlib.sha256(data).hexdigest() for name, data in encoded.items()}}
    _write_folder(folder, report, encoded)
    link(folder, waiting)
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
    return digest([asdict(piece), split, lead, params.seed, asked, code_digest(["corpus", "scores", "synthesis"], _PLAYERS)])


def _render(piece, split, lead, params):
    """Report on a piece, and its recordings as a dictionary of name to samples."""
    score = read_score(piece)
    rng = np.random.default_rng([params.seed, zlib.crc32(piece.id.encode())])
    hand, arranger = rng.spawn(2)  # draws of their own: what people do changes nothing else
    tempo = (score.tempo or rng.uniform(*piece.tempo)) * np.exp(0.05 * rng.standard_normal())
    score = score.until((_SECONDS[1] - 2 * TAIL) * tempo / 60)
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
    families, takes = cycle(draw_families(score.notes, shifts, rng)), {}
    for number, (family, k) in enumerate(zip(families, shifts, strict=False), start=1):
        programs = draw_programs(family, score.notes, shifts, rng)
        own = by_hand(score.notes, played, programs, hand) if hand.random() < params.human else played
        takes[str(number)] = Take(own, programs, k)
    return takes


def _evaluation_takes(score, steady, tempo, lead, rng):
    """The takes of a held-out piece: as written, transposed, and by another player at another tempo, in another sound."""
    k = int(rng.choice([k for k in range(-_HELDOUT_SHIFT, _HELDOUT_SHIFT + 1) if k]))
    families = draw_families(score.notes, [0, k], rng)
    lead = lead or next(family for family in families if family != "piano")
    other = next(family for family in families if family != lead)
    programs = draw_programs(lead, score.notes, [0, k], rng)
    free = perform(score.notes, tempo * np.exp(rng.uniform(*np.log(OTHER_TEMPI))), FREE, rng)
    return {
        "original": Take(steady, programs, 0),
        "transposed": Take(steady, programs, k),
        "performance": Take(free, draw_programs(other, score.notes, [0], rng), 0),
    }


def _beat_times(score, steady, free):
    """Times in s of the same beats in the score's rendering and in the performance."""
    beats = score.beats[score.beats <= score.notes["onset"].max()]
    return {"score": steady.times(beats).round(4).tolist(), "performance": free.times(beats).round(4).tolist()}


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
