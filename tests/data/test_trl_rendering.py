"""Token ids against TRL's own `DPOTrainer._prepare_dataset`: every template of its wheel with tokenizers of every kind.

Equal ids, or a refusal that is TRL's too, or that says that there is nothing to learn: never other ids. With
`DPO_JAX_SWEEP=1` twice as many pairs of template and kind are compared.
"""

import collections
import contextlib
import importlib.resources
import itertools
import os
import types

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dpo_jax.data.comparison import Skip
from dpo_jax.data.render import make_renderer, render_batch
from tests.data.rendering_rows import comparison_of, conversations, some_text, texts
from tests.data.small_tokenizers import KINDS, small_tokenizer

trl = pytest.importorskip("trl", reason="needs TRL, which .ci/run installs")
pytestmark = pytest.mark.extras

TEMPLATES = {
    file.name.removesuffix(".jinja"): file.read_text()
    for file in sorted((importlib.resources.files("trl") / "chat_templates").iterdir(), key=lambda file: file.name)
    if file.name.endswith(".jinja")
}
# Every template with some kind, and every kind with templates of several families.
SWEEP = bool(os.environ.get("DPO_JAX_SWEEP"))
FAMILIES = ("qwen3", "llama3", "gemma", "phi3", "deepseekv3") if SWEEP else ("qwen3", "gemma")
_KINDS = itertools.cycle(KINDS)
PAIRS = sorted(
    {(name, next(_KINDS)) for name in TEMPLATES for _ in range(2 if SWEEP else 1)}
    | {(name, kind) for name in FAMILIES for kind in KINDS}
)
COUNTS = collections.Counter()


class Rows(list):
    """As much of a dataset as `_prepare_dataset` asks for."""

    def map(self, function, fn_kwargs=None):
        return Rows({**row, **function(dict(row), **(fn_kwargs or {}))} for row in self)


def trl_ids(tokenizer, row):
    """Prompt, chosen and rejected ids as TRL prepares the row; raises what TRL raises."""
    trainer, args = types.SimpleNamespace(_tokenizer=tokenizer), types.SimpleNamespace(max_length=None)
    (made,) = trl.DPOTrainer._prepare_dataset(trainer, Rows([row]), tokenizer, args, "train")
    return made["prompt_ids"], made["chosen_ids"], made["rejected_ids"]


def compare(tokenizer, form, rows):
    renderer = make_renderer(tokenizer, form, 10**6, 10**6)
    for row, rendered in zip(rows, render_batch(renderer, [comparison_of(row) for row in rows]), strict=True):
        expected = None
        with contextlib.suppress(Exception):  # a template refuses in many ways
            expected = trl_ids(tokenizer, row)
        if expected is None:
            assert rendered.reason == "template_error", row
            COUNTS["refused by the template"] += 1
            continue
        if not isinstance(rendered, Skip):
            assert (rendered.prompt, rendered.chosen, rendered.rejected) == expected, row
            COUNTS["equal"] += 1
            COUNTS["equal, boundary moved"] += rendered.boundary_moved
            continue
        prompt, chosen, rejected = expected
        nothing = {
            "template_boundary": not prompt,
            "empty_chosen": not chosen,
            "empty_rejected": not rejected,
            "identical_answers": chosen == rejected,
        }
        assert nothing.get(rendered.reason), (rendered, row)
        COUNTS[rendered.reason] += 1


# A failure is shown as it is: looking for a smaller one takes minutes.
ours = settings(
    max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_rows_of_messages(name, kind):
    tokenizer = small_tokenizer(kind, TEMPLATES[name])

    @ours
    @given(st.lists(conversations(), min_size=6, max_size=6))
    def rows_agree(rows):
        compare(tokenizer, "chat", rows)

    before = COUNTS["equal"]
    rows_agree()
    COUNTS["pairs"] += 1
    COUNTS["pairs that render"] += COUNTS["equal"] > before


strings = st.fixed_dictionaries({"prompt": some_text, "chosen": texts, "rejected": texts}).filter(
    lambda row: row["chosen"] != row["rejected"]
)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_strings(kind):
    tokenizer = small_tokenizer(kind, TEMPLATES["qwen3"])
    ends = st.sampled_from(["", tokenizer.eos_token, f"{tokenizer.eos_token}\n"])
    begins = st.sampled_from(["", tokenizer.bos_token or "", "<|im_start|>user\n"])
    written = st.builds(
        lambda row, begin, end: {**row, "prompt": begin + row["prompt"], "chosen": row["chosen"] + end},
        strings,
        begins,
        ends,
    )

    @ours
    @given(st.lists(written, min_size=15, max_size=15))
    def rows_agree(rows):
        compare(tokenizer, "text", rows)

    rows_agree()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("T5")])  # which ends texts itself
def test_transcripts_have_the_ids_of_the_equal_string_row(kind):
    tokenizer = small_tokenizer(kind)
    renderer = make_renderer(tokenizer, "plain", 10**6, 10**6)

    @ours
    @given(st.lists(strings, min_size=15, max_size=15))
    def rows_agree(rows):
        for row, rendered in zip(rows, render_batch(renderer, [comparison_of(row) for row in rows]), strict=True):
            if isinstance(rendered, Skip):
                assert rendered.reason == "identical_answers"
                continue
            prompt = f"\n\nHuman: {row['prompt']}\n\nAssistant:"
            same = {"prompt": prompt, "chosen": f" {row['chosen']}", "rejected": f" {row['rejected']}"}
            assert (rendered.prompt, rendered.chosen, rendered.rejected) == trl_ids(tokenizer, same), row
            COUNTS["transcripts equal"] += 1

    rows_agree()


def test_enough_was_compared(capsys):
    """What was compared; the numbers that the documentation gives."""
    if COUNTS["pairs"] < len(PAIRS) or not COUNTS["transcripts equal"]:
        pytest.skip("counts what the other tests of this file compare, in one process")
    with capsys.disabled():
        print("\n" + ", ".join(f"{count} {what}" for what, count in sorted(COUNTS.items())))
    assert COUNTS["pairs that render"] >= 0.91 * len(PAIRS) >= 40
    assert COUNTS["equal"] >= 8.7 * len(PAIRS)
    assert COUNTS["equal"] > 10 * COUNTS["identical_answers"]
