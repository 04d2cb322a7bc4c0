"""Answers to all prompts of a file, block by block, written in the order of the prompts."""

from collections.abc import Iterable, Iterator, Sequence

from dpo_jax.answering.flags import Request
from dpo_jax.answering.found import Found
from dpo_jax.answering.output import Output, answer_line
from dpo_jax.answering.progress import Tracker
from dpo_jax.answering.ready import block_size, make_prompt_renderer, make_sampler, open_policy, place, tokens_of
from dpo_jax.answering.together import the_firsts_day, the_firsts_number
from dpo_jax.config.settings import Settings
from dpo_jax.data.cuts import Ids
from dpo_jax.data.prompts import Prompt
from dpo_jax.parallel.processes import is_first
from dpo_jax.sampling.engine import Capacity, Sampled, draw_names
from dpo_jax.sampling.memory import free_bytes
from dpo_jax.sampling.params import Answer
from dpo_jax.training.workdir import same_everywhere


def draw_answers(
    r: Request, found: Found, config: Settings | None, prompts: Sequence[Prompt], output: Output, done: int
) -> None:
    """Answer the prompts behind the first `done`, and write them.

    Every process of several calls it, with the same but for `output`, which is the first one's.

    Raises:
      UserError: the model or a prompt is refused, before anything is compiled.
    """
    first = is_first()
    same_everywhere(
        {"flags": r.decides, "prompts": output.about["prompts_digest"], "model": output.about["model_files"]}
    )
    policy = open_policy(found)
    day = the_firsts_day(output.about["day"])
    renderer = make_prompt_renderer(policy.tokenizer, r.prompt_format, r.chat_template, day)
    ids = tokens_of(renderer, policy.config, prompts)
    names = draw_names(ids, [prompt.id for prompt in prompts])
    dtype = "" if r.cache_dtype == "auto" else r.cache_dtype
    layout, params = place(found, policy, config, r.dtype)
    devices = f"{layout.mesh.size} x {layout.platform}, {layout.dtype.name}"
    memory = the_firsts_number(output.begin(devices, free_bytes(layout)))
    sampler = make_sampler(policy, layout, Capacity(rows=r.rows, cache_dtype=dtype, memory=memory))
    given = [_given(prompt, tokens, policy.tokenizer) for prompt, tokens in zip(prompts, ids, strict=True)]
    size = block_size(sampler, r.asked)
    with Tracker(len(prompts), done, quiet=not first) as tracker:
        for start in range(done // size * size, len(prompts), size):
            block = slice(start, start + size)
            drawn = sampler.sample(params, ids[block], r.asked, names[block])
            for at, answers in in_order(_counted(drawn, tracker), r.asked.n):
                if start + at < done:
                    continue  # written before; drawn again with its block
                if first:
                    prompt = prompts[start + at]
                    output.write(answer_line(prompt, given[start + at], answers, output.about["model"], r.asked))
                tracker.answered(1)
            output.settle()


def in_order(drawn: Iterable[Sampled], n: int) -> Iterator[tuple[int, list[Answer]]]:
    """Each prompt's place and its n answers, in the order of the prompts, as soon as all before it are complete."""
    waiting: dict[int, dict[int, Answer]] = {}
    turn = 0
    for one in drawn:
        waiting.setdefault(one.prompt, {})[one.sample] = one.answer
        while len(waiting.get(turn, ())) == n:
            held = waiting.pop(turn)
            yield turn, [held[k] for k in range(n)]
            turn += 1
    assert not waiting, "every prompt has all its answers at the end"


def _counted(drawn: Iterable[Sampled], tracker: Tracker) -> Iterator[Sampled]:
    for one in drawn:
        tracker.ended(len(one.answer.token_ids))
        yield one


def _given(prompt: Prompt, tokens: Ids, tokenizer: object) -> object:
    """The prompt as it was given; where only the tokenizer could find it, the text of its tokens."""
    return tokenizer.decode(tokens) if prompt.given is None else prompt.given  # type: ignore[attr-defined]
