"""What tells a judge from another one, so that a file of verdicts is not gone on with by another judge. No JAX."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dpo_jax.answering.found import Found, model_digest
from dpo_jax.config.judges import GOLD, IMPLICIT, divided
from dpo_jax.disk import digest
from dpo_jax.preference.load import directory_of
from dpo_jax.preference.models import Ensemble, Function, PreferenceModel


@runtime_checkable
class Identified(PreferenceModel, Protocol):
    """A preference model that tells itself from others of its name."""

    def about(self) -> Mapping[str, Any]:
        """What its verdicts depend on, as JSON; no secret."""
        ...


def judge_identity(spec: str, judge: PreferenceModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the judge that `spec` and these options have loaded, as JSON."""
    if isinstance(judge, Ensemble):
        each = zip(divided(spec), judge.members, strict=True)
        return {"name": spec, "members": [_single(name, member, options) for name, member in each]}
    return _single(spec, judge, options)


def _single(name: str, judge: PreferenceModel, options: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(judge, Identified):
        about = dict(judge.about())
    elif isinstance(judge, Function):
        about = {"code": _code_digest(judge)}
    elif name == GOLD:
        about = {}
    else:
        models = [directory_of(one) for one in name.removeprefix(IMPLICIT).split(",")]
        files = [model_digest(Found(one, one, str(options.get("revision", "")))) for one in models]
        about = {"files": files, "options": dict(options)}
    # As it is read back: tuples become lists, and keys texts.
    return {"name": name, **json.loads(json.dumps(about, default=str))}


def _code_digest(judge: Function) -> str:
    """Of the file that has the function; empty if there is none, as for what is typed."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(judge.function))
        return digest(Path(file).read_bytes()) if file else ""
    except (OSError, TypeError, ValueError):
        return ""
