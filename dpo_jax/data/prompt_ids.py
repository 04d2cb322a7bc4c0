"""Token ids of prompts, as training has them."""

from collections.abc import Sequence

from dpo_jax.data.comparison import LabeledComparison, Skip
from dpo_jax.data.cuts import Ids
from dpo_jax.data.prompts import Prompt, prompt_refusal
from dpo_jax.data.render import Renderer, render_batch

_BATCH = 512


def prompt_tokens(renderer: Renderer, prompts: Sequence[Prompt]) -> list[Ids]:
    """Token ids of prompts, see `tokens_or_reasons`.

    Raises:
      UserError: one cannot be rendered; with where it stands.
    """
    found: list[Ids] = []
    for prompt, one in zip(prompts, tokens_or_reasons(renderer, prompts), strict=True):
        if isinstance(one, Skip):
            raise prompt_refusal(prompt.where, one)
        found.append(one)
    return found


def is_templated(renderer: Renderer, prompt: Prompt) -> bool:
    """Whether a prompt's text is taken letter for letter, as the format says or as it is templated already."""
    texts = prompt.comparison.texts
    if texts is None:
        return False
    return renderer.form == "text" or (renderer.auto and renderer.templated.search(texts[0]) is not None)


def tokens_or_reasons(renderer: Renderer, prompts: Sequence[Prompt]) -> list[Ids | Skip]:
    """Token ids up to where an answer begins, as training has them; a beginning token is never there twice.

    Of a prompt that cannot be rendered it is the reason.
    """
    found: list[Ids | Skip] = []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        rendered = render_batch(renderer, [LabeledComparison(p.comparison, "A") for p in batch])
        for one in rendered:
            if isinstance(one, Skip):
                found.append(one)
                continue
            ids = [*one.prompt, *one.left_out]
            if renderer.form == "text" or "templated" in one.notes:
                ids = ids[: len(ids) - len(renderer.trailing)]  # what the tokenizer ends a text with: this one goes on
            found.append(ids[1:] if "bos_twice" in one.notes else ids)
    return found
