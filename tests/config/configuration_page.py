"""docs/configuration.md, made from the table of keys."""

from dpo_jax.config.keys import SECTIONS, Key

HEAD = """# Configuration

Every key, made from the table in [keys.toml](../dpo_jax/config/keys.toml) by
`python -m pytest tests/test_docs.py --write-docs`; `python -m dpo_jax.train --help` prints them too. On the command
line a key is `--config.KEY=VALUE`. A dataset's file ([configs/hhh.py](../configs/hhh.py), ...) and its presets change
defaults. `--config=configs/hhh.py` works from every directory, also where the package is installed without a checkout.

A file of your own can be anywhere: `python -m dpo_jax.train --config=DIR/mine.py:PRESET ...` with

```python
import dpo_jax


def get_config(preset=""):
    c = dpo_jax.get_config("configs/hhh.py")  # or get_config(): every key at its default
    c.update(dataset="pairs.jsonl", batch_size=32)
    return c
```

In Python, `dpo_jax.run(config, workdir)` takes the same config.
"""


def page() -> str:
    """The whole page."""
    out = [HEAD]
    for title, keys in SECTIONS.items():
        out += [f"## {title[0].upper()}{title[1:]}\n", "| key | default | values | meaning |", "|---|---|---|---|"]
        out += [_row(key) for key in keys]
        out.append("")
    return "\n".join(out)


def _row(key: Key) -> str:
    shown = '""' if key.default == "" else str(key.default)
    return f"| `{key.name}` | `{shown}` | {_escaped(key.values)} | {_escaped(key.meaning)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\\n", "\\\\n").replace("*", "\\*")
