"""What the command lines share: parameters, paths, and errors that end in one line."""

import argparse
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from gae import params
from gae.errors import GaeError, explained


@contextmanager
def stage(description, reads, **paths):
    """Parse the command line of a stage, and turn the user's mistakes into one line and exit code 1.

    Parameters
    ----------
    description : str
        What the stage does.
    reads : sequence of str
        The sections or dotted keys of params.yaml that it reads; ``--help`` lists them.
    **paths : str
        Options for its inputs and outputs, with the paths that DVC uses as defaults.

    Yields
    ------
    params : gae.params.Params
    paths : SimpleNamespace of Path
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set while the stage was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout:  # may be closed
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a sign; the files have it
    parser = argparse.ArgumentParser(
        description=description,
        epilog="parameters read (key = default  meaning; what is allowed):\n" + params.describe(reads),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="parameters (default: %(default)s)")
    parser.add_argument("-S", "--set", action="append", default=[], metavar="KEY=VALUE", help="replace one parameter, as in dvc exp run")
    for name, default in paths.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, type=_written, metavar="PATH", help="default: %(default)s")
    given = parser.parse_args()
    with one_line_errors(parser.prog):
        values = params.load(given.params, given.set)
        yield values, SimpleNamespace(**{name: Path(getattr(given, name)) for name in paths})


def _written(path):
    """The path of an option, unless it is empty, as of a variable of the shell that is not set."""
    if not path:
        raise argparse.ArgumentTypeError("an empty path; write one, or leave the option out")
    return path


@contextmanager
def one_line_errors(program, interrupted="run it again to go on"):
    """End the program with one line on standard error where the user can mend what went wrong, or stopped it."""
    try:
        yield
    except (GaeError, OSError, MemoryError) as error:
        sys.exit(f"{program}: error: {explained(error)}")
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted; {interrupted}")
