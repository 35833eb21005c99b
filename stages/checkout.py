"""Imported first by every stage: what must be settled before anything else is imported.

This checkout's `gae` goes before an installed one: an experiment that DVC runs in a copy of the repository then runs the
code of that copy. And threads that wait leave their core to others: while one step is computed, the next is read.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when PyTorch is imported
