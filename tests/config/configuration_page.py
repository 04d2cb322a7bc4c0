"""docs/configuration.md from the comments of configs/common.py, which are the one place where a key is described."""

import re
from pathlib import Path

from configs import common

HEAD = """# Configuration

Every key, made from the comments of [configs/common.py](../configs/common.py) by
`python -m pytest tests/test_docs.py --write-docs`. On the command line a key is `--config.KEY=VALUE`; a dataset's file
(`configs/hhh.py`, ...) and its presets change defaults.
"""


def sections(source: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """(section, [(key, comment)]) in the order of the file; a comment line before a key is the start of its comment.

    Raises:
      ValueError: a key has no comment.
    """
    found: list[tuple[str, list[tuple[str, str]]]] = []
    before = ""
    for line in source.splitlines():
        if named := re.fullmatch(r"    # --- (.+)", line):
            found.append((named[1], []))
        elif more := re.fullmatch(r"    # (.+)", line):
            before += more[1] + " "
        elif key := re.fullmatch(r"    c\.(\w+) = .*?(?:  # (.+))?", line):
            if not key[2]:
                raise ValueError(f"configs/common.py: {key[1]} has no comment")
            found[-1][1].append((key[1], before + key[2]))
            before = ""
    return found


def page() -> str:
    """The whole page."""
    defaults = common.get_config()
    out = [HEAD]
    for name, keys in sections(Path(common.__file__).read_text()):
        out += [f"## {name[0].upper()}{name[1:]}\n", "| key | default | meaning |", "|---|---|---|"]
        for key, comment in keys:
            default = defaults[key]
            shown = '""' if default == "" else str(default)
            out.append(f"| `{key}` | `{shown}` | {_escaped(comment)} |")
        out.append("")
    return "\n".join(out)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\\n", "\\\\n").replace("*", "\\*")
