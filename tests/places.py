"""Where tests find what they read: the repository, recorded numbers, and the shared data where there is any."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared" / "data"
