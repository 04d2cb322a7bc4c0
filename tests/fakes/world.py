"""What happens in the fake project of `launching.py`, for its tools, its trainers and the tests themselves."""

import contextlib
import fcntl
import json
import os
from pathlib import Path

CLOUD = Path(os.environ.get("FAKE_CLOUD", ""))  # of the tools and trainers; a test names its own


@contextlib.contextmanager
def world(cloud=CLOUD):
    """What happens, for reading and changing by one process at a time."""
    with open(cloud / "world.json", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        state = json.load(file)
        try:
            yield state
        finally:
            file.seek(0)
            file.truncate()
            json.dump(state, file)
