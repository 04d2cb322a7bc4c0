"""Direct Preference Optimization on TPUs: one jitted step, shared prompts, packed pairs.

The public names, each imported when it is first used: importing this package takes no JAX and no time.
"""

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

# transformers is asked for tokenizers and configs only; without torch it would say so at every start.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# A command of ours that is still importing has nothing to save: until entry.py takes it back, Ctrl-C ends it as it ends
# any program, where Python would print a traceback. While `python -m` looks for its module, "-m" is the program's name.
_called = os.path.basename((sys.argv or [""])[0])
_is_command = _called.startswith("dpo-jax-") or (
    _called == "-m" and any(name.startswith("dpo_jax.") for name in sys.orig_argv[1:])
)
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if TYPE_CHECKING:
    from dpo_jax.answering.api import sample
    from dpo_jax.config.file import get_config
    from dpo_jax.data.comparison import Comparison, LabeledComparison, Skip
    from dpo_jax.errors import UserError
    from dpo_jax.objective.losses import LOSSES
    from dpo_jax.preference.load import load_preference_model
    from dpo_jax.preference.models import PreferenceModel
    from dpo_jax.train import run
    from dpo_jax.weights.load import load_policy

__all__ = [
    "LOSSES",
    "Comparison",
    "LabeledComparison",
    "PreferenceModel",
    "Skip",
    "UserError",
    "get_config",
    "load_policy",
    "load_preference_model",
    "run",
    "sample",
]

_MODULES = {
    "LOSSES": "objective.losses",
    "Comparison": "data.comparison",
    "LabeledComparison": "data.comparison",
    "PreferenceModel": "preference.models",
    "Skip": "data.comparison",
    "UserError": "errors",
    "get_config": "config.file",
    "load_policy": "weights.load",
    "load_preference_model": "preference.load",
    "run": "train",
    "sample": "answering.api",
}


def __getattr__(name: str) -> Any:
    if name == "sample":  # the module of this name can be called as the function: one thing, however it is reached
        return importlib.import_module("dpo_jax.sample")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
