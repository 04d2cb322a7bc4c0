"""Answer prompts with a model: `python -m dpo_jax.sample --model=DIR|RUN|ID --prompts=FILE --n=4 --out=answers.jsonl`.

Exit codes (docs/sampling.md): 0 done; 2 bad input, one line on standard error, before anything is compiled; 70 another
process is gone; 74 the disk is full; 130 interrupted. After all but 2 the same command resumes the file.

The module is callable, too: `dpo_jax.sample(model, prompts, ...)` is `dpo_jax.answering.api.sample`.
"""

import contextlib
import sys
import types
from collections.abc import Sequence
from typing import Any

from dpo_jax.answering.door import run_command
from dpo_jax.answering.flags import Request, is_typed, parse_request
from dpo_jax.answering.found import Found, locate_model
from dpo_jax.answering.output import Output, about_answers, opened, tell
from dpo_jax.config.opened import settings_of
from dpo_jax.data.prompts import Prompt, dataset_prompts, prompts_in, read_prompts
from dpo_jax.entry import exit_within_a_limit


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = sys.argv if argv is None else argv
    return run_command(given, parse_request, answer_request, lambda request: request.distributed)


def answer_request(r: Request, several: bool = False) -> None:
    """Answer what is asked for; what is quick to refuse is refused before anything slow is imported.

    Raises:
      UserError: bad input, in one line.
    """
    config = settings_of(r.config) if r.config else None
    found = locate_model(r.model, r.revision)
    if is_typed(r):
        from dpo_jax.answering.talk import talk

        talk(r, found, config)
        return
    prompts, said = _prompts(r, found)
    about = about_answers(r.decides, found, prompts)
    with contextlib.ExitStack() as stack:
        output, done = _open(r, about, prompts, stack, several)
        if output is not None:
            for line in (*said, *output.said[: 0 if output.is_finished else None]):
                tell(line)
        if done == len(prompts):
            if output is not None:
                tell(f"{r.out}: finished, {done:,} prompts are answered; --overwrite begins it anew")
            return
        from dpo_jax.answering.draw import draw_answers

        draw_answers(r, found, config, prompts, output or Output(None, about), done)


def _prompts(r: Request, found: Found) -> tuple[list[Prompt], list[str]]:
    """The prompts, and what is to be said of them."""
    if r.dataset:
        path = r.dataset_path
        if r.dataset == "synthetic" and not path and found.run is not None and found.settings is not None:
            path = str(found.run / f"synthetic-{found.settings.seed}")
        return dataset_prompts(r.dataset, path, r.split, columns=r.columns, revision=r.dataset_revision, limit=r.limit)
    if r.prompts in ("", "-"):
        return prompts_in(sys.stdin.buffer.read(), r.columns, r.limit), []
    return read_prompts(r.prompts, r.columns, r.limit), []


def _open(
    r: Request, about: dict[str, Any], prompts: list[Prompt], stack: contextlib.ExitStack, several: bool
) -> tuple[Output | None, int]:
    """The output, of the first process alone, and how many prompts are answered in it."""
    open_it = lambda: stack.enter_context(opened(r.out, about, prompts, overwrite=r.overwrite))
    if not several:
        output = open_it()
        return output, output.done
    from dpo_jax.answering.together import by_the_first

    return by_the_first(open_it)


class _Callable(types.ModuleType):
    """This module where it is called as `dpo_jax.sample(...)`."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        from dpo_jax.answering.api import sample

        return sample(*args, **named)

    @property
    def __wrapped__(self) -> Any:  # for `inspect.signature`
        from dpo_jax.answering.api import sample

        return sample


if __name__ == "__main__":
    exit_within_a_limit(main)
sys.modules[__name__].__class__ = _Callable
