"""Lets the tests import their neighbour ``tiny_block``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
