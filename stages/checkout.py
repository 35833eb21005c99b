"""Imported first by every stage: puts this checkout's `gae` before an installed one.

An experiment that DVC runs in a copy of the repository then runs the code of that copy.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
