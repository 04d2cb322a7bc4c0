"""Disks of a size that tests choose."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(path, size):
    """A file system of so many bytes at `path` (`1200k`, `3m`), gone in the end; skips where none can be mounted."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)
