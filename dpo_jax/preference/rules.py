"""Rules: judges that are Python functions, by the name `module:function`. No JAX.

`dpo_jax.preference.rules:shorter` is one, and the pattern for one's own: a function of a `Comparison` that says a
number from -1 (A is better) to +1 (B is), 0 for a tie, None for no verdict. Scores become such a number by
`math.tanh((b - a) / 2)`. Order need not be minded: every comparison is asked both ways round (see `models.Function`).
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dpo_jax.data.comparison import Comparison, Message
from dpo_jax.errors import UserError
from dpo_jax.preference.models import Function


def shorter(comparison: Comparison) -> float:
    """The completion with fewer characters wins: +1 is B's, -1 A's, 0 of equal ones.

    Of a completion of several messages all that the assistant says counts; of one that only the tokenizer can tell
    from its prompt, the text.
    """
    a, b = _said(comparison.completion_a), _said(comparison.completion_b)
    if comparison.texts and not comparison.prompt_conversation:
        _, a, b = map(len, comparison.texts)
    return float((a > b) - (a < b))


def load_function(name: str) -> Function:
    """The judge that `module:function` names; the module may be in the current directory.

    Raises:
      UserError: no such module or function, it is none, or the module cannot be imported; in one line.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise UserError(f"judge {name}: needed is module:function, such as {__name__}:{shorter.__name__}")
    module = _imported(module_name, f"judge {name}")
    if (function := getattr(module, function_name, None)) is None:
        raise UserError(f"judge {name}: module {module_name} has no {function_name}; check the name")
    if not callable(function) or isinstance(function, type):
        what = "class" if isinstance(function, type) else type(function).__name__
        raise UserError(f"judge {name}: {function_name} is a {what}; needed is a function of one comparison")
    found: Callable[[Comparison], Any] = function
    return Function(name, found)


def _imported(module_name: str, what: str) -> object:
    """A module, also from the current directory, which the path of an installed command lacks."""
    if (here := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last: it hides nothing
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        mend = "run from its directory or add that to PYTHONPATH"
        why = " ".join(str(error).split())
        raise UserError(f"{what}: module {module_name} cannot be imported ({why}); {mend}") from error
    except (Exception, SystemExit) as error:  # the module is the user's own code
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{what}: importing module {module_name} failed ({why}); mend it") from error


def _said(completion: Sequence[Message]) -> int:
    """Characters that the assistant says."""
    return sum(len(turn["content"]) for turn in completion if turn["role"] == "assistant")
