"""Rendering: the same ids as TRL's tokenisation of whole texts, wherever a text is cut, and the limits."""

import contextlib
import datetime
import json
import os
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_jax.data.comparison import Comparison, LabeledComparison, Skip
from dpo_jax.data.cuts import Cuts, sure_cuts
from dpo_jax.data.forms.reader import parse_own
from dpo_jax.data.render import Rendered, make_renderer, render_batch
from dpo_jax.data.template import unread_fields
from dpo_jax.errors import UserError
from tests import places
from tests.data.rendering_rows import comparison_of, conversations
from tests.data.small_tokenizers import KINDS, small_tokenizer

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
    options = {"tools": labeled.comparison.tools, **(labeled.comparison.chat_template_kwargs or {})}
    prompt = encode(messages, add_generation_prompt=True, **options)
    both = [encode(messages + list(answer), **options) for answer in (labeled.chosen, labeled.rejected)]
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
    start, end = f"\n\nHuman: {prompt}\n\nAssistant:", tokenizer.eos_token
    leading = [0] if name.startswith("special") else []
    for completion, text in ((rendered.chosen, chosen), (rendered.rejected, rejected)):
        whole = tokenizer(f"{start} {text.removesuffix(end)}{end}", add_special_tokens=False)["input_ids"]
        assert rendered.prompt + completion == [*leading, *whole]


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
        ({"prompt_format": "alpaca"}, "use auto, chat, plain or text"),
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


@pytest.mark.parametrize(("name", "kind"), [("chatml", kind) for kind in KINDS] + [("llama2", kind) for kind in KINDS])
def test_ids_are_those_of_whole_texts_for_every_kind_of_tokenizer(name, kind):
    tokenizer = small_tokenizer(kind, {"chatml": CHATML, "llama2": LLAMA2}[name])

    @settings(max_examples=2, deadline=None, derandomize=True)
    @given(st.lists(conversations(), min_size=6, max_size=6))
    def agree(rows):
        pairs = [comparison_of(row) for row in rows]
        for labeled, rendered in zip(pairs, render_batch(make_renderer(tokenizer, "chat"), pairs), strict=True):
            if isinstance(rendered, Skip):
                assert rendered.reason in ("template_error", "identical_answers")
                with contextlib.suppress(jinja2.TemplateError):
                    expected = trl_ids(tokenizer, labeled)
                    assert expected[1] == expected[2]
            else:
                assert ids(rendered) == trl_ids(tokenizer, labeled)

    agree()


@pytest.mark.parametrize("split", [False, True])
def test_what_was_set_on_the_backend_before_changes_no_id(split):
    plain, used = (small_tokenizer("GPT-2", CHATML) for _ in range(2))
    for tokenizer in (plain, used):
        tokenizer.split_special_tokens = split
    renderer = make_renderer(used)
    used.backend_tokenizer.enable_truncation(4)
    used.backend_tokenizer.enable_padding(length=90)
    used.backend_tokenizer.encode_special_tokens = not split
    labeled = pair("Why is the sea blue?", "It mirrors the sky.", "Nobody knows.")
    assert ids(one(renderer, labeled)) == ids(one(make_renderer(plain), labeled)) == trl_ids(plain, labeled)


def test_cuts_are_at_tokens_that_no_other_hides_and_at_a_transcripts_colon():
    tokenizer = small_tokenizer("GPT-2", CHATML)
    cuts = sure_cuts(tokenizer, [CHATML])
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert cuts.place(start, start + "Yes", start + "No") == start.rindex("<|im_start|>")
    assert cuts.place(start, start[:-1] + "a", start + "No") == start.rindex("<|im_start|>")
    assert cuts.place(start, start[:9], start + "No") == 0
    assert cuts.place("Q: a\n\nA:", "Q: a\n\nA: b", "Q: a\n\nA: c") == len("Q: a\n\nA:")
    assert cuts.place("Q: a\n\nA:", "Q: a\n\nA: b", "Q: a\n\nA:c") == 0
    for kind in ("byte-level with a prefix space", "byte-level that merges over words", "Metaspace never", "Unigram"):
        assert not sure_cuts(small_tokenizer(kind, CHATML), [CHATML]).colon
    assert sure_cuts(small_tokenizer("in Python", CHATML), [CHATML]) == Cuts()
    split = small_tokenizer("GPT-2", CHATML)
    split.split_special_tokens = True
    assert sure_cuts(split, [CHATML]) == Cuts()
    for other in ("<|im_start|>assistant", "\n<|im", "x<|im_start|>y"):  # begins with it, reaches into it, hides it
        tokenizer.add_tokens([tokenizers.AddedToken(other, normalized=False)])
        assert not sure_cuts(tokenizer, [CHATML]).marks.fullmatch("<|im_start|>")
        assert one(make_renderer(tokenizer), pair("a", "b", "c")).chosen
        tokenizer = small_tokenizer("GPT-2", CHATML)
    tokenizer.add_tokens([tokenizers.AddedToken("t: ", normalized=False)])
    assert not sure_cuts(tokenizer, [CHATML]).colon
    for flags in ({"lstrip": True}, {"single_word": True}, {"normalized": True}):
        tokenizer.add_tokens([tokenizers.AddedToken("<mark>", **{"normalized": False, **flags})])
        assert not sure_cuts(tokenizer, [CHATML + "<mark>"]).marks.fullmatch("<mark>")
        tokenizer = small_tokenizer("GPT-2", CHATML)


def strings(prompt, chosen, rejected, **more):
    turns = (
        [{"role": role, "content": text}]
        for role, text in (("user", prompt), ("assistant", chosen), ("assistant", rejected))
    )
    return LabeledComparison(Comparison(*turns, texts=(prompt, chosen, rejected), **more), "A")


TEMPLATED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def decoded(tokenizer, rendered):
    return tuple(tokenizer.decode(part) for part in ids(rendered))


def test_text_is_taken_as_it_is_and_ends_once():
    tokenizer = TOKENIZERS["chatml"]
    rendered = one(make_renderer(tokenizer, "text"), strings(TEMPLATED, "Yes<|im_end|>", "No"))
    assert decoded(tokenizer, rendered) == (TEMPLATED, "Yes<|im_end|>", "No<|im_end|>")
    assert rendered.notes == ()
    blanks = one(make_renderer(tokenizer, "text"), strings(TEMPLATED, "Yes<|im_end|>\n", "No"))
    assert decoded(tokenizer, blanks)[1] == "Yes<|im_end|>\n<|im_end|>"  # as TRL, and said
    assert blanks.notes == ("eos_twice",)
    adds = TOKENIZERS["special tokens added to every text"]  # <|im_start|> before, <|im_end|> behind
    twice = one(make_renderer(adds, "text"), strings(TEMPLATED, "Yes", "No"))
    assert decoded(adds, twice) == ("<|im_start|>" + TEMPLATED, "Yes<|im_end|><|im_end|>", "No<|im_end|><|im_end|>")
    assert twice.notes == ("bos_twice", "eos_twice")


def test_a_prompt_that_is_templated_already_is_text_unless_a_form_is_asked_for():
    tokenizer = TOKENIZERS["chatml"]
    row = strings(TEMPLATED, "Yes<|im_end|>", "No<|im_end|>")
    automatic, asked = (one(make_renderer(tokenizer, form), row) for form in ("auto", "chat"))
    assert decoded(tokenizer, automatic) == (TEMPLATED, "Yes<|im_end|>", "No<|im_end|>")
    assert automatic.notes == ("templated",)
    assert decoded(tokenizer, asked)[0] == f"<|im_start|>user\n{TEMPLATED}<|im_end|>\n<|im_start|>assistant\n"
    assert decoded(tokenizer, asked)[1] == "Yes<|im_end|>\n"  # the template's own end, once
    assert asked.notes == ("templated_inside",)
    assert one(make_renderer(tokenizer, "plain"), row).notes == ("templated_inside",)
    assert one(make_renderer(tokenizer), strings("Hi", "Yes", "No")).notes == ()
    messages = one(make_renderer(tokenizer), pair(TEMPLATED, "Yes", "No"))  # as TRL has them, and said
    assert ids(messages) == trl_ids(tokenizer, pair(TEMPLATED, "Yes", "No"))
    assert messages.notes == ("templated_inside",)


def test_marks_of_prose_tell_nothing_unless_a_prompt_begins_with_them():
    tokenizer = small_tokenizer(
        "SentencePiece BPE, Llama", "{% for m in messages %}{{ m.role }} {{ m.content }}</s>{% endfor %}"
    )
    tokenizer.add_tokens([tokenizers.AddedToken("<start_of_turn>", special=True, normalized=False)])
    renderer = make_renderer(tokenizer)
    assert tokenizer.bos_token == "<s>"
    for prompt, found in (
        ("What is <s> in HTML?", False),
        ("<s>[INST] a", True),
        ("a <start_of_turn>", True),
        ("a", False),
    ):
        assert (renderer.templated.search(prompt) is not None) == found
    only_listed = bpe_tokenizer()  # special in tokenizer.json alone, without a name
    only_listed.add_tokens([tokenizers.AddedToken("<|end|>", special=True, normalized=False)], special_tokens=False)
    assert make_renderer(only_listed).templated.search("a<|end|>")


def test_whole_templated_texts_are_cut_where_the_assistants_last_turn_in_common_begins():
    tokenizer = TOKENIZERS["chatml"]
    early = TEMPLATED + "Well?<|im_end|>\n<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\n"
    row = LabeledComparison(Comparison((), (), (), texts=("", early + "Yes<|im_end|>", early + "No<|im_end|>")), "A")
    for form in ("auto", "text"):
        assert decoded(tokenizer, one(make_renderer(tokenizer, form), row)) == (early, "Yes<|im_end|>", "No<|im_end|>")
    assert one(make_renderer(tokenizer, "chat"), row).reason == "no_transcript"
    none = LabeledComparison(Comparison((), (), (), texts=("", "Hello", "Bye")), "A")
    assert one(make_renderer(tokenizer), none).reason == "no_transcript"
    assert one(make_renderer(bpe_tokenizer(template=None)), row).reason == "no_transcript"


def test_text_and_transcript_refuse_by_name_what_they_cannot_hold():
    ask, answers = [{"role": "user", "content": "a"}], [[{"role": "assistant", "content": text}] for text in "bc"]
    called = [{"role": "assistant", "content": "b", "tool_calls": [{"name": "f"}]}]
    rows = {
        "tools": Comparison(ask, *answers, [{"name": "f"}]),
        "chat_template_kwargs": Comparison(ask, *answers, None, {"enable_thinking": True}),
        "tool_calls": Comparison(ask, called, answers[1]),
        "name": Comparison([{"role": "user", "content": "a", "name": "Bo"}], *answers),
    }
    for form, reason in (("plain", "not_plain"), ("text", "not_text")):
        renderer = make_renderer(TOKENIZERS["chatml"], form)
        for name, comparison in rows.items():
            skip = one(renderer, LabeledComparison(replace(comparison, texts=("a", "b", "c")), "A"))
            assert skip.reason == reason
            assert f"no place for {name};" in skip.detail
    text = make_renderer(TOKENIZERS["chatml"], "text")
    assert "has messages" in one(text, pair("a", "b", "c")).detail
    system = Comparison([{"role": "system", "content": "Be brief."}, *ask], *answers, texts=("a", "b", "c"))
    assert "not hold the system turn" in one(text, LabeledComparison(system, "A")).detail
    assert "has a system turn" in one(text, LabeledComparison(replace(system, texts=None), "A")).detail
    empty = Comparison(ask, [{**called[0], "tool_calls": []}], answers[1], [], {}, texts=("a", "b", "c"))
    assert isinstance(one(text, LabeledComparison(empty, "A")), Rendered)


def test_several_turns_as_an_answer_are_turns_of_the_transcript():
    turns = lambda last: [
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": last},
    ]
    row = LabeledComparison(Comparison([{"role": "user", "content": "Hi"}], turns("0."), turns("No.")), "A")
    tokenizer = TOKENIZERS["chatml"]
    rendered = one(make_renderer(tokenizer, "plain"), row)
    assert decoded(tokenizer, rendered)[:2] == (
        "\n\nHuman: Hi\n\nAssistant:", " Hello.\n\nHuman: Which?\n\nAssistant: 0.<|im_end|>",
    )  # fmt: skip
    assert ids(one(make_renderer(tokenizer), row)) == trl_ids(tokenizer, row)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{{ messages[7].content + 1 }}", "UndefinedError: list object has no element 7"),
        ("{{ 1 + messages[0].content }}", "TypeError: unsupported operand type(s) for +: 'int' and 'str'"),
        ("{{ raise_exception('no\n  turns') }}", "no turns"),
        ("{{ messages | attr }}", "TypeError: "),
    ],
)
def test_whatever_a_template_raises_is_one_line(body, message):
    tokenizer = bpe_tokenizer("{% if messages[0].content == 'bad' %}" + body + "{% endif %}" + CHATML)
    first, second = render_batch(make_renderer(tokenizer), [pair("bad", "a", "b"), pair("good", "a", "b")])
    assert (first.reason, first.detail[: len(message)]) == ("template_error", message)
    assert "\n" not in first.detail
    assert not isinstance(second, Skip)


def test_a_template_of_a_wrong_syntax_is_one_line():
    with pytest.raises(UserError, match="TemplateSyntaxError: Expected an expression, got 'end of statement block'"):
        make_renderer(bpe_tokenizer("{% if %}" + CHATML))


def test_a_template_that_needs_a_system_turn_is_not_asked_without_one():
    tokenizer = bpe_tokenizer("{{ raise_exception('needs a system turn') if messages[0].role != 'system' }}" + CHATML)
    row = pair([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}], "b", "c")
    renderer = make_renderer(tokenizer)
    assert ids(one(renderer, row)) == trl_ids(tokenizer, row)
    assert renderer.turn == "<|im_start|>assistant\n"
    assert one(renderer, pair("a", "b", "c")) == Skip("template_error", "needs a system turn")


def test_of_several_templates_the_default_or_the_named_one_or_by_tools_tool_use():
    tokenizer = bpe_tokenizer({"default": CHATML, "short": "{{ messages[-1].content }}", "tool_use": "t" + CHATML})
    first = lambda renderer, row: tokenizer.decode(one(renderer, row).prompt)
    row = pair("a", "b", "c")
    tools = LabeledComparison(replace(row.comparison, tools=[]), "A")
    assert first(make_renderer(tokenizer), row).startswith("<|im_start|>")
    assert first(make_renderer(tokenizer), tools).startswith("t<|im_start|>")
    assert ids(one(make_renderer(tokenizer), tools)) == trl_ids(tokenizer, tools)
    named = one(make_renderer(tokenizer, chat_template="short"), pair("ab", "abc", "abd"))
    assert decoded(tokenizer, named) == ("ab", "c", "d")
    with pytest.raises(UserError, match="no template of this name; it has default, short, tool_use"):
        make_renderer(tokenizer, chat_template="long")
    tokenizer.chat_template = {"b": CHATML, "a": CHATML}
    with pytest.raises(UserError, match=r"none is the default; name one: --config\.chat_template=a or b"):
        make_renderer(tokenizer)
    make_renderer(tokenizer, "plain")  # has no need of one
    with pytest.raises(UserError, match="no template of this name; it has none"):
        make_renderer(bpe_tokenizer(template=None), chat_template="long")


def test_fields_that_leave_no_trace_are_noted():
    plain, reads = TOKENIZERS["chatml"], bpe_tokenizer(CHATML + "{{ messages[-1].reasoning_content }}{{ loud }}")
    turn = {"role": "assistant", "content": "b", "thinking": "Hm."}
    base = pair("a", "b", "c").comparison
    row = LabeledComparison(
        replace(base, completion_a=[turn], chat_template_kwargs={"loud": "x"}, tools=[{"name": "f"}]), "A"
    )
    assert one(make_renderer(plain), row).notes == ("unread loud", "unread thinking", "unread tools")
    assert one(make_renderer(reads), row).notes == ("unread tools",)  # transformers gives thinking another name
    bare = bpe_tokenizer(CHATML.replace("m['content']", "m['content'] or ''"))
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}}]
    called = LabeledComparison(replace(base, completion_a=[{"role": "assistant", "tool_calls": calls}]), "A")
    assert unread_fields(make_renderer(bare).template, called.comparison, {}) == ["tool_calls"]  # in place of a text
    same = LabeledComparison(replace(base, chat_template_kwargs={"tokenize": True}), "A")
    assert one(make_renderer(plain), same).reason == "template_option"


def test_a_date_is_that_of_the_run_and_not_of_the_clock():
    body = "{%- set day = strftime_now('%d %b %Y, %A, %-d.%-m.%y %H:%M') %}\n  {{ day }}" + CHATML
    renderer = make_renderer(bpe_tokenizer(body), template_date="2026-07-06")
    text = renderer.tokenizer.decode(one(renderer, pair("a", "b", "c")).prompt)
    assert text.startswith("  06 Jul 2026, Monday, 6.7.26 00:00<|im_start|>")
    assert make_renderer(bpe_tokenizer(body)).template.day == datetime.date.today().isoformat()
    today, plain = (body.replace("%H:%M", ""), "{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    for source in (today, plain, "\n" + plain, "  {% if true %}\n" + plain + "{% endif %}"):
        tokenizer = bpe_tokenizer(source)
        assert ids(one(make_renderer(tokenizer), pair("a", "b", "c"))) == trl_ids(tokenizer, pair("a", "b", "c"))
    assert make_renderer(TOKENIZERS["chatml"], template_date="2026-07-06").template.day == ""
