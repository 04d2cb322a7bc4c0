"""The datasets that have a name: where their files are, how they are split, how a row is read.

To add one: write a function `row -> LabeledComparison | Skip` and a line in `DATASETS`. Without touching the package:
`--config.dataset=my_module:my_function --config.dataset_path=FILES`.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_jax.data.comparison import LabeledComparison, RatedAnswer, Skip, checked
from dpo_jax.data.forms.chosen import Row
from dpo_jax.data.forms.families import chosen_and_rejected, transcripts, two_answers
from dpo_jax.data.forms.reader import Read, Reader, make_reader, read_own
from dpo_jax.data.forms.rename import NO_CHANGES, Columns
from dpo_jax.data.forms.scores import score_tie
from dpo_jax.data.forms.table import Outcome
from dpo_jax.errors import UserError

Parser = Callable[[Row], Outcome | Sequence[Outcome]]


@dataclass(frozen=True)
class DatasetSpec:
    """A named dataset, or files that are read alike.

    `read` makes pairs of a row, `columns` are renamed or left out before. `train` and `test` are patterns of paths
    inside the hub's repository (and inside a local copy of it). `subsets` are its top-level directories. `tied` is true
    of a row whose scores of chosen and rejected are equal, which `drop_ties` drops (never without scores); a parser's
    own label "Tie" is always dropped: such a row names no winner.
    """

    read: Reader
    train: str
    test: str
    licence: str
    hub: str = ""
    subsets: tuple[str, ...] = ()
    tied: Callable[[Row], bool] = lambda row: False
    columns: Columns = NO_CHANGES


_HH_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")

DATASETS: dict[str, DatasetSpec] = {
    "hhh": DatasetSpec(
        make_reader((transcripts,)),
        "*/train.jsonl*",
        "*/test.jsonl*",
        "MIT",
        "Anthropic/hh-rlhf",
        subsets=_HH_SUBSETS,
    ),
    "helpsteer3": DatasetSpec(
        make_reader((two_answers,)),
        "preference/train.jsonl*",
        "preference/validation.jsonl*",
        "CC-BY-4.0",
        "nvidia/HelpSteer3",
    ),
    "ultrafeedback": DatasetSpec(
        make_reader((chosen_and_rejected,)),
        "data/train_prefs-*.parquet",
        "data/test_prefs-*.parquet",
        "MIT",
        "HuggingFaceH4/ultrafeedback_binarized",
        tied=score_tie,
    ),
    # Written by dpo_jax.data.synthetic in HH's layout; its subsets may have any name.
    "synthetic": DatasetSpec(make_reader((transcripts,)), "*/train.jsonl*", "*/test.jsonl*", "generated"),
}

# A user's own files: any accepted columns; the split is read from the file names (see sources.py).
OWN = DatasetSpec(read_own, "", "", "the user's", tied=score_tie)


def read_with(parse: Parser) -> Reader:
    """The reader that a parser of one's own makes; it has no form, and answers for all of its row."""

    def read(row: Row) -> Read:
        result = parse(row)
        return None, tuple(result) if isinstance(result, Sequence) else (result,)

    return read


def load_parser(name: str) -> Parser:
    """The function that `module:function` names, guarded: what it raises or returns wrongly is one bad row.

    It may return a list of several pairs; a `RatedAnswer` becomes a pair with a later row of the same prompt.

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

    def sound(result: object) -> Outcome:
        if isinstance(result, Skip | RatedAnswer):
            return result
        if isinstance(result, LabeledComparison):
            return checked(result)
        return Skip("parser_error", f"{name} returned {type(result).__name__}, not LabeledComparison or Skip")

    def guarded(row: Row) -> Outcome | list[Outcome]:
        try:
            result = parse(row)
            return [sound(one) for one in result] if isinstance(result, list | tuple) else sound(result)
        except (Exception, SystemExit) as error:
            return Skip("parser_error", f"{name} raised {type(error).__name__}: {' '.join(str(error).split())}")

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
