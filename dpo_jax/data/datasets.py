"""The datasets that have a name: where their files are, how they are split, how a row is read.

To add one: write a function `row -> LabeledComparison | Skip` and a line in `DATASETS`. Without touching the package:
`--config.dataset=my_module:my_function --config.dataset_path=FILES`.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dpo_jax.data import columns
from dpo_jax.data.columns import Parser, Row
from dpo_jax.data.comparison import LabeledComparison, Skip, checked
from dpo_jax.errors import UserError


def parse_ultrafeedback(row: Row) -> LabeledComparison | Skip:
    """UltraFeedback in its four published variants and as plain strings, told apart by the columns.

    >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    >>> other = [turns[0], {"role": "assistant", "content": "What?"}]
    >>> parse_ultrafeedback({"prompt": "Hi", "chosen": turns, "rejected": other}).rejected
    ({'role': 'assistant', 'content': 'What?'},)
    """
    if "chosen_response" in row or "rejected_response" in row:
        return columns.parse_argilla(row)
    return columns.parse_chosen_rejected(row)


@dataclass(frozen=True)
class DatasetSpec:
    """A named dataset.

    `train` and `test` are patterns of paths inside the hub's repository (and inside a local copy of it). `subsets`
    are its top-level directories. `tied` is true of a row whose scores of chosen and rejected are equal, which
    `drop_ties` drops (never without scores); a parser's own label "Tie" is always dropped: such a row names no winner.
    """

    parse: Parser
    train: str
    test: str
    licence: str
    hub: str = ""
    subsets: tuple[str, ...] = ()
    tied: Callable[[Row], bool] = lambda row: False


_HH_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")

DATASETS: dict[str, DatasetSpec] = {
    "hhh": DatasetSpec(
        columns.parse_hh, "*/train.jsonl*", "*/test.jsonl*", "MIT", "Anthropic/hh-rlhf", subsets=_HH_SUBSETS
    ),
    "helpsteer3": DatasetSpec(
        columns.parse_helpsteer3,
        "preference/train.jsonl*",
        "preference/validation.jsonl*",
        "CC-BY-4.0",
        "nvidia/HelpSteer3",
    ),
    "ultrafeedback": DatasetSpec(
        parse_ultrafeedback,
        "data/train_prefs-*.parquet",
        "data/test_prefs-*.parquet",
        "MIT",
        "HuggingFaceH4/ultrafeedback_binarized",
        tied=columns.score_tie,
    ),
    # Written by dpo_jax.data.synthetic in HH's layout; its subsets may have any name.
    "synthetic": DatasetSpec(columns.parse_hh, "*/train.jsonl*", "*/test.jsonl*", "generated"),
}

# A user's own files: any accepted columns; the split is read from the file names (see sources.py).
OWN = DatasetSpec(columns.parse_own, "", "", "the user's", tied=columns.score_tie)


def load_parser(name: str) -> Parser:
    """The function that `module:function` names, guarded: what it raises or returns wrongly is one bad row.

    UserError if there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"dataset={name}: module {module_name} cannot be imported ({error}); run from its directory or add that to "
            "PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:  # the module is the user's own code
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"dataset={name}: importing module {module_name} failed ({what}); mend it") from error
    if (parse := getattr(module, function_name, None)) is None:
        raise UserError(f"dataset={name}: module {module_name} has no {function_name}; check the name")
    if not callable(parse):
        raise UserError(f"dataset={name}: {function_name} is a {type(parse).__name__}; needed is a function of one row")

    def guarded(row: Row) -> LabeledComparison | Skip:
        try:
            result = parse(row)
            if isinstance(result, Skip):
                return result
            if isinstance(result, LabeledComparison):
                return checked(result)
        except (Exception, SystemExit) as error:
            return Skip("parser_error", f"{name} raised {type(error).__name__}: {' '.join(str(error).split())}")
        return Skip("parser_error", f"{name} returned {type(result).__name__}, not LabeledComparison or Skip")

    return guarded


def own_code(name: str) -> list[Path]:
    """The files of the code behind `module:function`: its module, and what it imports from the same package or folder.

    None for a parser of this package, which has no such name. Of an installed module outside any package only its own
    file counts: its folder holds every other package.
    """
    module = sys.modules.get(name.partition(":")[0]) if ":" in name else None
    if module is None or not (file := module.__file__):
        return []
    top = sys.modules[module.__name__.partition(".")[0]]
    root = Path(file).resolve().parent
    if getattr(top, "__path__", None):
        root = Path(next(iter(top.__path__))).resolve()
    elif root.name in ("site-packages", "dist-packages"):
        return [Path(file)]
    loaded = {Path(f).resolve() for m in list(sys.modules.values()) if (f := getattr(m, "__file__", None))}
    return sorted(f for f in loaded if f.suffix == ".py" and (f == Path(file).resolve() or root in f.parents))
