"""Small disks, to be filled."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(path, size):
    """A file system of its own at `path`, such as of "1200k"; where none can be mounted, the test is skipped."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def grow(path, size):
    """Give a small disk so much room."""
    subprocess.run(["mount", "-o", f"remount,size={size}", path], check=True)
