"""What `python -m dpo_jax.collect` does: block by block, prompts are answered, judged and paired, and written.

What is quick to refuse is refused before anything slow is imported.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_jax.answering.found import Found, locate_model
from dpo_jax.answering.output import tell
from dpo_jax.collecting.flags import CollectRequest
from dpo_jax.collecting.output import PairFile, about_pairs, opened_pairs
from dpo_jax.collecting.prompts import REASONS, Surveyed, as_told, held_out_keys, of_the_run, survey
from dpo_jax.collecting.summary import print_collected, summarised
from dpo_jax.config.opened import settings_of
from dpo_jax.config.settings import Settings
from dpo_jax.data.comparison import Skip
from dpo_jax.data.forms.transcripts import transcript_prompt
from dpo_jax.data.prompt_ids import is_templated, tokens_or_reasons
from dpo_jax.data.prompts import Prompt
from dpo_jax.errors import UserError
from dpo_jax.judging.console import wide_console
from dpo_jax.judging.identity import judge_identity
from dpo_jax.preference.load import load_preference_model
from dpo_jax.preference.models import PreferenceModel, told_by
from dpo_jax.sampling.selection import OF_ANSWERS, OF_PROMPTS

if TYPE_CHECKING:
    from dpo_jax.data.render import Renderer
    from dpo_jax.training.on_policy import AskedPrompt


def collect(r: CollectRequest, several: bool = False) -> None:
    """Collect what is asked for.

    Raises:
      UserError: bad input, in one line; no answers could be paired.
    """
    config = settings_of(r.answering.config) if r.answering.config else None
    found = locate_model(r.answering.model, r.answering.revision)
    surveyed = survey(r, found).without(held_out_keys(r, found))
    judge = load_preference_model(r.judge, **r.options)
    from dpo_jax.answering.ready import open_policy

    policy = open_policy(found)
    said = ""
    if not r.held_out:
        keys, said = of_the_run(found, policy.tokenizer)
        surveyed = surveyed.without(keys)
    identity = judge_identity(r.judge, judge, r.options)
    about = about_pairs(r.decides, found, identity, surveyed)
    with contextlib.ExitStack() as stack:
        file = _open(r, about, stack, several)
        if file is not None:
            for line in filter(None, (said, *as_told(surveyed.dropped, REASONS), *file.said)):
                tell(line)
        if not _is_finished(file, several):
            _draw(r, found, policy, config, judge, surveyed, file)
        elif file is not None:
            tell(f"{file.path}: finished; --overwrite begins it anew")
        if file is not None:
            _show(r, file, judge)


def _open(r: CollectRequest, about: dict[str, Any], stack: contextlib.ExitStack, several: bool) -> PairFile | None:
    """The file, of the first process alone."""
    open_it = lambda: stack.enter_context(opened_pairs(r.answering.out, about, overwrite=r.answering.overwrite))
    if not several:
        return open_it()
    from dpo_jax.training.workdir import first_only

    held: list[PairFile] = []
    first_only(lambda: held.append(open_it()))
    return held[0] if held else None


def _is_finished(file: PairFile | None, several: bool) -> bool:
    if not several:
        return file is not None and file.is_finished
    from dpo_jax.parallel.mesh import from_first

    return bool(from_first(np.asarray(file is not None and file.is_finished)))


def _draw(
    r: CollectRequest,
    found: Found,
    policy: Any,
    config: Settings | None,
    judge: PreferenceModel,
    surveyed: Surveyed,
    file: PairFile | None,
) -> None:
    """The blocks behind what is done. Every process of several calls it; `file` is the first one's."""
    from dpo_jax.answering.progress import Tracker
    from dpo_jax.answering.ready import block_size, make_prompt_renderer, make_sampler, place
    from dpo_jax.answering.together import the_firsts_day, the_firsts_number
    from dpo_jax.sampling.engine import Capacity
    from dpo_jax.sampling.memory import free_bytes
    from dpo_jax.training.on_policy import check_judged, collect_pairs, pair_record
    from dpo_jax.training.workdir import same_everywhere

    a = r.answering
    about = file.about if file is not None else about_pairs(r.decides, found, {}, surveyed)
    same_everywhere({"flags": r.decides, "prompts": about["prompts_digest"], "model": about["model_files"]})
    renderer = make_prompt_renderer(policy.tokenizer, a.prompt_format, a.chat_template, the_firsts_day(about["day"]))
    layout, params = place(found, policy, config, a.dtype)
    devices = f"{layout.mesh.size} x {layout.platform}, {layout.dtype.name}"
    free = free_bytes(layout)
    memory = the_firsts_number(0 if file is None else file.begin(devices, free))
    dtype = "" if a.cache_dtype == "auto" else a.cache_dtype
    sampler = make_sampler(policy, layout, Capacity(rows=a.rows, cache_dtype=dtype, memory=memory))
    done = the_firsts_number(0 if file is None else file.done)
    every_line = {"model": about["model"], "judge": r.judge, "seed": a.asked.seed}
    every_line |= {"round": a.asked.round} if a.asked.round else {}
    with Tracker(len(surveyed), done, quiet=file is None) as tracker:
        for block in _blocks(surveyed.kept(done), block_size(sampler, a.asked)):
            prompts, left_out = askable(renderer, policy.config.max_position_embeddings, block)
            found_pairs = collect_pairs(sampler, params, judge, prompts, a.asked, r.rules)
            if not done and not tracker.answers:  # later, one that has no score is counted as such
                check_judged(judge, found_pairs)
            tracker.ended(found_pairs.tokens, len(prompts) * a.asked.n)
            if file is not None:
                lines = [pair_record(pair, every_line) for pair in found_pairs.pairs]
                drawn = {"answers": len(prompts) * a.asked.n, "tokens": found_pairs.tokens, "pairs": len(lines)}
                seconds = {"sampling": found_pairs.sampling_seconds, "judging": found_pairs.judging_seconds}
                file.write(lines, len(block), {**left_out, **found_pairs.dropped, **drawn}, seconds)
            tracker.answered(len(block))


def askable(
    renderer: "Renderer", longest: int, prompts: Sequence[Prompt]
) -> "tuple[list[AskedPrompt], dict[str, int]]":
    """Prompts as answers are collected for them, and how many the model cannot answer, by reason.

    Args:
      longest: the model's positions, for a prompt with its answer.
    """
    from dpo_jax.training.on_policy import AskedPrompt

    left_out: Counter[str] = Counter()
    found = []
    for prompt, ids in zip(prompts, tokens_or_reasons(renderer, prompts), strict=True):
        if isinstance(ids, Skip) or prompt.given is None:  # or no judge can be shown what it asks
            left_out["not_rendered"] += 1
        elif not 0 < len(ids) < longest:
            left_out["too_long" if ids else "not_rendered"] += 1
        else:
            strips = renderer.form == "plain" or transcript_prompt(prompt.given) is not None
            # Where there is no id draws depend on the tokens, as those of `python -m dpo_jax.sample` do.
            name = tuple(ids) if prompt.id is None else prompt.id
            as_texts = is_templated(renderer, prompt)
            found.append(AskedPrompt(prompt.name, ids, name, prompt.comparison, strips, as_texts))
    return found, dict(left_out)


def _blocks(prompts: Iterator[Prompt], size: int) -> Iterator[list[Prompt]]:
    while block := list(islice(prompts, size)):
        yield block


def _show(r: CollectRequest, file: PairFile, judge: PreferenceModel) -> None:
    """What there is to say at the end.

    Raises:
      UserError: there is no pair.
    """
    for line in told_by(judge):
        tell(line)
    result = summarised(file)
    print_collected(result, wide_console())
    if not result.pairs:
        why = "; ".join(as_told(result.dropped, OF_ANSWERS | OF_PROMPTS | REASONS))
        raise UserError(f"--out={file.path}: no pair could be made ({why}); docs/collecting.md says what to do")
    if r.html:
        from dpo_jax.collecting.page import write_pairs_page

        tell(f"page {write_pairs_page(Path(r.html), result, file.path, r.shown)}")
