"""Rendering: the same ids as TRL's tokenisation of whole texts, whatever shortcut is taken, and the limits."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_jax.data.comparison import Comparison, LabeledComparison, Skip
from dpo_jax.data.forms.reader import parse_own
from dpo_jax.data.render import make_renderer, render_batch
from dpo_jax.errors import UserError
from tests import places

SAMPLES = places.SHARED
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
CORPUS = [
    "Human: hello there\n\nAssistant: hello, how are you?\n\n",
    "[INST] what is 12 + 34? [/INST] it's 46",
    "a  b\n\n\nc",
]


def bpe_tokenizer(template=CHATML, split=True, bos=False, limit=400):
    """A small byte-level BPE; without `split` merges cross words, as in Llama 2's tokenizer."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=limit, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 0), ("<|im_end|>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token=special[1])
    tokenizer.chat_template = template
    return tokenizer


def pair(prompt, chosen, rejected, label="A"):
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answers = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return LabeledComparison(Comparison(prompt, *answers), label)


def trl_ids(tokenizer, labeled):
    """TRL 1.16, DPOTrainer.tokenize_fn: whole texts, cut where their ids part from the prompt's."""
    encode = lambda messages, **options: tokenizer.apply_chat_template(messages, return_dict=True, **options)[
        "input_ids"
    ]
    messages = list(labeled.comparison.prompt_conversation)
    prompt = encode(messages, add_generation_prompt=True)
    both = [encode(messages + list(answer)) for answer in (labeled.chosen, labeled.rejected)]
    cut = min(len(os.path.commonprefix([prompt, whole])) for whole in both)  # noqa: RUF071 (ids, not paths)
    return prompt[:cut], both[0][cut:], both[1][cut:]


def one(renderer, labeled):
    (result,) = render_batch(renderer, [labeled])
    return result


def ids(rendered):
    return rendered.prompt, rendered.chosen, rendered.rejected


TOKENIZERS = {
    "chatml": bpe_tokenizer(),
    "llama2 template": bpe_tokenizer(LLAMA2),
    "merges cross words": bpe_tokenizer(LLAMA2, split=False),
    "special tokens added to every text": bpe_tokenizer(bos=True),
}
pieces = st.sampled_from(
    [" ", "\n", "\n\n", "hello", "Human:", " there", "12", "'s", "é", "🙂", "́", "<|im_end|>", "?", ":"]
)
texts = st.lists(pieces, min_size=1, max_size=6).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(prompt=texts, chosen=texts, rejected=texts)
def test_chat_ids_are_trls_for_any_text(name, prompt, chosen, rejected):
    labeled = pair(prompt, chosen, rejected)
    rendered = one(make_renderer(TOKENIZERS[name], "chat"), labeled)
    expected = trl_ids(TOKENIZERS[name], labeled)
    if isinstance(rendered, Skip):
        assert rendered.reason in ("identical_answers", "empty_chosen", "empty_rejected")
        assert expected[1] == expected[2] or not expected[1] or not expected[2]
    else:
        assert ids(rendered) == expected


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(prompt=texts, chosen=texts, rejected=texts)
def test_plain_ids_are_those_of_the_whole_transcript(name, prompt, chosen, rejected):
    tokenizer = TOKENIZERS[name]
    rendered = one(make_renderer(tokenizer, "plain"), pair(prompt, chosen, rejected))
    if isinstance(rendered, Skip):
        return
    start = f"\n\nHuman: {prompt}\n\nAssistant:"
    leading = [0] if name.startswith("special") else []
    for completion, text in ((rendered.chosen, chosen), (rendered.rejected, rejected)):
        whole = tokenizer(f"{start} {text}", add_special_tokens=False)["input_ids"]
        assert rendered.prompt + completion == [*leading, *whole, tokenizer.eos_token_id]


def test_shortcuts_are_taken_where_they_are_exact_and_nowhere_else():
    assert len(make_renderer(TOKENIZERS["chatml"]).clean_starts) == 94
    assert len(make_renderer(TOKENIZERS["chatml"], "plain").clean_starts) == 94
    assert not make_renderer(TOKENIZERS["merges cross words"]).clean_starts


def test_a_boundary_that_merges_is_counted_and_cut_as_trl_cuts_it():
    labeled = pair("hello", "\n\nhello", "\n\nthere")  # the prompt ends with a line break, too
    rendered = one(make_renderer(TOKENIZERS["chatml"]), labeled)
    assert rendered.boundary_moved
    assert ids(rendered) == trl_ids(TOKENIZERS["chatml"], labeled)
    assert not one(make_renderer(TOKENIZERS["chatml"]), pair("hello", "hello", "there")).boundary_moved


def test_the_end_of_turn_belongs_to_the_completion_and_to_nothing_else():
    tokenizer = TOKENIZERS["chatml"]
    rendered = one(make_renderer(tokenizer), pair("hello", "one", "two"))
    assert tokenizer.decode(rendered.prompt) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(rendered.chosen) == "one<|im_end|>\n"
    plain = one(make_renderer(tokenizer, "plain"), pair("hello", "one", "two"))
    assert tokenizer.decode(plain.prompt) == "\n\nHuman: hello\n\nAssistant:"
    assert tokenizer.decode(plain.rejected) == " two<|im_end|>"


def test_the_label_chooses_and_swapping_changes_no_id():
    renderer = make_renderer(TOKENIZERS["chatml"])
    labeled = pair("hello", "one", "two", "B")
    assert one(renderer, labeled) == one(renderer, labeled.swap()) == one(renderer, pair("hello", "two", "one"))


def test_a_beginning_of_sequence_id_is_as_the_tokenizer_adds_it_and_never_doubled():
    llama = TOKENIZERS["llama2 template"]  # the template writes BOS, the tokenizer does not
    assert one(make_renderer(llama), pair("hello", "one", "two")).prompt.count(llama.bos_token_id) == 1
    adding = bpe_tokenizer(LLAMA2, bos=True)  # both would
    assert one(make_renderer(adding), pair("hello", "one", "two")).prompt.count(adding.bos_token_id) == 1
    assert one(make_renderer(adding, "plain"), pair("hello", "one", "two")).prompt[0] == adding.bos_token_id
    assert adding.eos_token_id not in one(make_renderer(adding, "plain"), pair("hello", "one", "two")).prompt


def test_limits_cut_the_prompts_beginning_and_the_completions_end():
    renderer = make_renderer(TOKENIZERS["chatml"])
    labeled = pair("hello there " * 9, "one two three four", "ab")
    whole = one(renderer, labeled)
    short = replace(renderer, max_prompt_length=7, max_completion_length=5)
    cut = one(short, labeled)
    assert ids(cut) == (whole.prompt[-7:], whole.chosen[:5], whole.rejected[:5])
    assert cut.truncated == ("prompt", "chosen")
    assert whole.truncated == ()
    assert one(replace(short, overlong="drop"), labeled) == Skip("too_long", "prompt chosen")
    assert one(short, pair("hello", "12345678 a", "12345678 b")).reason == "identical_after_truncation"


def test_a_template_that_refuses_a_conversation_costs_that_row():
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    renderer = make_renderer(TOKENIZERS["llama2 template"])
    first, second = render_batch(renderer, [pair(system, "one", "two"), pair("hello", "one", "two")])
    assert first == Skip("template_error", "only user and assistant")
    assert ids(second) == trl_ids(renderer.tokenizer, pair("hello", "one", "two"))


def test_auto_means_chat_where_there_is_a_template():
    assert make_renderer(bpe_tokenizer()).form == "chat"
    assert make_renderer(bpe_tokenizer(template=None)).form == "plain"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_format": "chat"}, "no chat template; use plain"),
        ({"prompt_format": "alpaca"}, "use auto, chat or plain"),
        ({"overlong": "wrap"}, "use truncate or drop"),
        ({"max_prompt_length": 0}, "max_prompt_length=0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_renderer(bpe_tokenizer(template=None), **options)


def test_a_plain_completion_needs_an_end():
    tokenizer = bpe_tokenizer(template=None)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        make_renderer(tokenizer)


def test_a_sentencepiece_tokenizer_gives_the_ids_of_the_whole_text():
    directory = SAMPLES / "stories260k"
    if not directory.exists():
        pytest.skip("the SentencePiece tokenizer of stories260k is not beside the repository")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rendered = one(make_renderer(tokenizer), pair("Once upon", "a time", "  two"))
    for completion, text in ((rendered.chosen, "a time"), (rendered.rejected, "  two")):
        whole = tokenizer(f"\n\nHuman: Once upon\n\nAssistant: {text}")["input_ids"]
        assert rendered.prompt + completion == [*whole, tokenizer.eos_token_id]


def test_token_counts_are_those_that_trl_logged():
    """TRL's num_tokens adds up prompt + chosen and prompt + rejected over batches of 4 pairs."""
    directory = Path(os.environ.get("DPO_JAX_SMOLLM2", "/nowhere"))
    if not directory.exists() or not (SAMPLES / "trl").exists():
        pytest.skip("needs SmolLM2's tokenizer (DPO_JAX_SMOLLM2=DIR, made by tools/smollm2.py) and TRL's log")
    rows = [json.loads(line) for line in (SAMPLES / "trl/pairs.jsonl").read_text().splitlines()]
    logged = json.loads((SAMPLES / "trl/trl.json").read_text())["logged"]
    renderer = make_renderer(AutoTokenizer.from_pretrained(directory))
    total = 0
    for step, record in enumerate(logged):
        for rendered in render_batch(renderer, [parse_own(row) for row in rows[4 * step : 4 * step + 4]]):
            total += 2 * len(rendered.prompt) + len(rendered.chosen) + len(rendered.rejected)
        assert total == record["num_tokens"]
