"""Imported first by every stage: what must be settled before anything else is imported.

This checkout's `gae` goes before an installed one: an experiment that DVC runs in a copy of the repository then runs the
code of that copy. Threads that wait for each other look out a thousand times, then sleep: to wake up takes as long as many an
operation, and without an end they would keep the cores from other programs. And Ctrl-C while the rest is imported, which
takes seconds, ends the stage without a word, until `gae.commandline.stage` has one to say.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "OMP_WAIT_POLICY" not in os.environ:  # read once, when PyTorch is imported, and overruled by the other
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
