"""The command `gae`: audio files to features, and the original implementation's weights to a model file."""

import argparse
import os
import signal
import sys
from pathlib import Path

from tqdm import tqdm

import gae
from gae.commandline import one_line_errors
from gae.convert import convert_file, feature_names
from gae.errors import FormatError, GaeError, explained
from gae.features import SUFFIXES, audio_of, check_suffix
from gae.files import content_hash
from gae.modelfile import SHIPPED
from gae.original import import_weights
from gae.storage import absolute, check_place, is_url


def main(arguments=None):
    """Run the command `gae` with `arguments`, by default those of the process."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if arguments is None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # or what is half written would stay
    with one_line_errors(parser.prog, "files that are written are whole"):
        sys.exit(given.run(given))


def _convert(given):
    """Convert every input; name those that can't be converted and go on. Returns the exit code."""
    outs = _outs(given.audio, given.out, given.format)
    model = gae.load_model(given.weights)
    failures = 0
    for path, out in tqdm(outs.items(), desc="convert", unit="track", disable=len(outs) == 1 or None):  # None: in a terminal alone
        try:
            if out != Path(given.out):
                _spare(path, out)
            convert_file(path, out, model)
        except (GaeError, OSError, MemoryError) as error:
            tqdm.write(f"gae: error: {explained(error)}", file=sys.stderr)
            failures += 1
    return 1 if failures else 0


def _spare(path, out):
    """Refuse to write over another recording's features: names in a folder are told apart within one call only.

    A path says little, as it may be another from another folder.
    """
    if not os.path.lexists(out) or not (is_url(path) or Path(path).is_file()):
        return
    try:
        source, sha256 = audio_of(out)
    except FormatError:
        source, sha256 = "something else", None
    if source != path if is_url(path) else sha256 != content_hash(path):
        whose = f"another {source}" if source == path else source or "samples"
        raise FormatError(f"{out}: holds the features of {whose}; remove it, or name another folder for those of {path}")


def _import_weights(given):
    check_place(given.out)
    if Path(given.out).suffix != ".safetensors":
        raise FormatError(f"{given.out}: a model file; end the name in .safetensors")
    import_weights(given.save, given.out)
    return 0


def _outs(paths, out, suffix):
    """The feature file of each input: `out` itself, or one in the folder `out`."""
    if not (out and all(paths)):
        raise FormatError(f"{'AUDIO' if out else '--out'}: an empty name; write the path of a file")
    check_place(out)
    spelt = {}
    for path in paths:
        spelt.setdefault(absolute(path), path)
    paths = list(spelt.values())
    if len(paths) == 1 and not out.endswith("/") and not Path(out).is_dir():
        if not Path(out).suffix:
            raise FormatError(f"{out}: neither a feature file ({', '.join(SUFFIXES)}) nor a folder; end a folder's name in /")
        check_suffix(out)
        return {paths[0]: Path(out)}
    if Path(out).suffix.lower() in SUFFIXES and not Path(out).is_dir():
        raise FormatError(f"{out}: named like one feature file, for {len(paths)} in a folder; name a folder")
    if Path(out).exists() and not Path(out).is_dir():
        raise FormatError(f"{out}: a file that is there, for {len(paths)} in a folder; name a folder")
    return {path: Path(out) / (name + suffix) for path, name in feature_names(paths).items()}


def _parser():
    parser = argparse.ArgumentParser(prog="gae", description="Transposition-invariant interval features from audio.")
    parser.add_argument("--version", action="version", version=f"gae {gae.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="audio files to features", description="Convert audio files to features.")
    convert.add_argument("audio", nargs="+", metavar="AUDIO", help="path or URL: wav, flac, ogg, mp3, ...; any sample rate and channels")
    convert.add_argument("--out", required=True, metavar="PATH", help="feature file: .h5, .npz, or .csv for Sonic Visualiser; or a folder")
    convert.add_argument(
        "--weights", metavar="FILE", default=SHIPPED[0], help=f"model file, .safetensors, or {SHIPPED[1]} (default: %(default)s)"
    )
    convert.add_argument("--format", default=".h5", choices=SUFFIXES, help="of the files in a folder (default: %(default)s)")
    convert.set_defaults(run=_convert)

    importer = commands.add_parser(
        "import-weights",
        help="the original implementation's weights to a model file",
        description="Turn a model.save of the original implementation (cgae-invar) into a model file, without executing anything in it.",
    )
    importer.add_argument("save", metavar="MODEL.SAVE", help="the pickled PyTorch module")
    importer.add_argument("--out", required=True, metavar="FILE", help="model file to write, .safetensors")
    importer.set_defaults(run=_import_weights)
    return parser
