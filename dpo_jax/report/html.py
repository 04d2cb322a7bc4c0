"""Pages of one file each that fetch nothing: templates make them, and escape everything that comes from a run.

A run's page shows what models wrote, and what data sets hold: hostile input. Escaping is the defence; the content
security policy is the second one: only this page's own script (by its hash) runs, and nothing is fetched.
"""

import base64
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dpo_jax.disk import is_full, write_in_place
from dpo_jax.errors import BAD_INPUT, SAVE_FAILED, UserError
from dpo_jax.records.records import printable, show_metric

_PACKAGE = Path(__file__).parents[1]  # templates are named from here: report/templates/run.html


def run_color(i: int) -> str:
    """The CSS variable of a run's colour, or of a line's among several; there are eight."""
    return f"run-{i % 8}"


def render(template: str, **values: Any) -> str:
    """A template's text. In HTML all values are escaped; a value that is missing is an error."""
    return jinja_environment().get_template(template).render(values)


def write_page(path: Path, template: str, *, option: str, extra: str = "", **values: Any) -> Path:
    """Write a page.

    Args:
      option: the flag that names its place.
      extra: a script and a style besides every page's own, as `judging/templates/judging`.
      **values: for the template.

    Raises:
      UserError: the place cannot be written.
    """
    names = ("report/templates/page", *filter(None, (extra,)))
    script, style = (
        "".join((_PACKAGE / f"{name}.{kind}").read_text("utf-8") for name in names) for kind in ("js", "css")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = render(template, script=Markup(script), style=Markup(style), digest=digest, **values)
    try:
        # A lone surrogate in an answer has no UTF-8 form: a question mark stands for it.
        write_in_place(path, page.encode("utf-8", "replace"))
    except OSError as error:
        mend, code = f"choose another place with {option}", BAD_INPUT
        if is_full(error):
            mend, code = "make room, then give the same command", SAVE_FAILED
        raise UserError(f"cannot write {path}: {error.strerror}; {mend}", code=code) from error
    return path


@functools.cache
def jinja_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PACKAGE),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "json": json.dumps,
        "size": _size,
        "shown": lambda value, name: show_metric(name, value).replace("-", "−"),
    }
    return environment


def _visible(value: Any) -> Any:
    """What a template writes of a value: control characters become visible, so an answer cannot hide anything."""
    return value if hasattr(value, "__html__") else printable(str(value))


def _size(held: int) -> str:
    """Bytes for a person."""
    thousands = min(4, (len(str(held)) - 1) // 3)
    value, unit = held / 1000**thousands, ("B", "kB", "MB", "GB", "TB")[thousands]
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
