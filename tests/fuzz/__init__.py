"""Hostile and damaged input given to the real commands: whatever it is, each ends as docs/faults.md says.

    python -m tests.fuzz --minutes=30 --seed=7       as many cases as there is time for, and counts by kind
    python -m tests.fuzz --case=NAME                 one of them again, with all that it printed
    python -m tests.fuzz --list --kinds=model        the names

The rule of every case (`rule.py`): a documented exit code, at most one line on standard error, no traceback, within 20
seconds and 2 GB, nothing touched outside the run's directory and the caches. Some must also say a word: damage that is
survived without one may have been believed.
"""
