"""Prompts from every form of rows, and their token ids: those that training has for the same prompt."""

import json

import pytest

from dpo_jax.data.comparison import Comparison, LabeledComparison, Skip
from dpo_jax.data.prompt_ids import prompt_tokens
from dpo_jax.data.prompts import dataset_prompts, prompt_of, prompts_digest, prompts_in, read_prompts, with_prompts
from dpo_jax.data.render import make_renderer, render_batch
from dpo_jax.data.sources import find_sources
from dpo_jax.errors import UserError
from tests.data.small_tokenizers import small_tokenizer
from tests.data.test_render import CHATML, LLAMA2, bpe_tokenizer

HI = [{"role": "user", "content": "Hi"}]
LONG = 1 << 20


def given(*rows, **options):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return [prompt.given for prompt in prompts_in(content, **options)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi"}, "Hi"),
        ({"prompt": HI}, HI),
        ({"prompt": [{"from": "human", "value": "Hi"}]}, HI),
        ({"prompt": json.dumps(HI)}, HI),
        ({"question": "Hi", "answer": "Hello"}, "Hi"),
        ({"instruction": "Mend it.", "input": "freind", "output": "friend"}, "Mend it.\n\nfreind"),
        ({"prompt": "Hi", "system": "Be brief."}, [{"role": "system", "content": "Be brief."}, *HI]),
        ({"messages": [*HI, {"role": "assistant", "content": "Hello"}]}, HI),
        ({"prompt": "Hi", "completion": "Hello", "label": True}, "Hi"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "Hi"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "Hi"),  # no pair, but a prompt
        ({"prompt": "Hi", "response_a": "a", "response_b": "b", "winner": "tie"}, "Hi"),
        ({"prompt": "Hi", "answers": [{"text": "a", "logprob": -1.0}], "model": "m", "seed": 0}, "Hi"),  # our own
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: a"},
            "\n\nHuman: Hi\n\nAssistant:",
        ),
        (
            {
                "chosen": [*HI, {"role": "assistant", "content": "a"}],
                "rejected": [*HI, {"role": "assistant", "content": "b"}],
            },
            HI,
        ),
    ],
    ids=lambda x: json.dumps(x)[:60],
)
def test_a_row_gives_its_prompt(row, expected):
    assert given(row) == [expected]
    assert given(row, row) == [expected] * 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": ""}, "the prompt is empty or blank"),
        ({"prompt": " \n "}, "the prompt is empty or blank"),
        ({"prompt": [{"role": "user", "content": " "}]}, "the prompt is empty or blank"),
        ({"prompt": 3}, "needed is text or messages, found int"),
        ({"prompt": [*HI, {"role": "assistant", "content": "Hello"}]}, "ends with a assistant turn"),
        ({"prompt": [{"role": "elf", "content": "Hi"}]}, "role 'elf'"),
        ({"prompt": "Hi", "persona": "a rude pirate"}, "persona has the text 'a rude pirate' that no form reads"),
        ({"text": "Hi"}, "found text; needed is prompt"),
        ({"prompt": "Hi", "id": [1]}, r"id is \[1\]"),
        ({"prompt": "Hi", "id": True}, "id is True"),
        ({"prompt": "\ud800"}, "surrogates not allowed"),
    ],
    ids=lambda x: json.dumps(x)[:60] if isinstance(x, dict) else "",
)
def test_a_row_without_a_prompt_is_refused_by_its_line(row, words):
    content = json.dumps({"prompt": "Hi"}) + "\n\n" + json.dumps(row)
    with pytest.raises(UserError, match=rf"^standard input:3: .*{words}"):
        prompts_in(content.encode())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no prompts in it"),
        (b'{"prompt": "a"}\n{"prompt', ":2: invalid json"),
        (b'{"prompt": "a"}\n"b"', ":2: not an object"),
        (b'[{"prompt": "a"}', "breaks off"),
        (b"\xff\xfea", "not UTF-8"),
    ],
)
def test_what_is_no_rows_is_refused(content, words):
    with pytest.raises(UserError, match=words):
        prompts_in(content)


def test_ids_are_the_rows_own_or_their_lines():
    rows = [{"prompt": "a", "id": "x"}, {"prompt": "b"}, {"prompt": "c", "id": 7}]
    prompts = prompts_in("\n".join(map(json.dumps, rows)).encode())
    assert [prompt.name for prompt in prompts] == ["x", 2, 7]
    assert [prompt.id for prompt in prompts] == ["x", None, 7]
    twice = [{"prompt": "a", "id": 1}, {"prompt": "b"}, {"prompt": "c", "id": "1"}]
    with pytest.raises(UserError, match=r"input:3: the id '1' is that of standard input:1 too; give every row an id"):
        prompts_in("\n".join(map(json.dumps, twice)).encode())
    clash = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "id": 2}]
    with pytest.raises(UserError, match="the number of a row stands for its id"):
        prompts_in("\n".join(map(json.dumps, clash)).encode())


def test_texts_are_a_prompt_a_line(tmp_path):
    expected = [("Hi there", 1), ("You, too", 3)]
    content = b"Hi there\r\n\nYou, too\n"
    assert [(p.given, p.name) for p in prompts_in(content)] == expected
    (tmp_path / "a.txt").write_bytes(content)
    assert [(p.given, p.name) for p in read_prompts(str(tmp_path / "a.txt"))] == expected
    assert len(read_prompts(str(tmp_path / "a.txt"), limit=1)) == 1


def test_files_of_every_kind_and_several_of_them(tmp_path):
    (tmp_path / "a.csv").write_text("question,notes\nHi,\nYou,\n")
    assert [p.given for p in read_prompts(str(tmp_path / "a.csv"), "prompt:question")] == ["Hi", "You"]
    with pytest.raises(UserError, match="no row has a column ask"):
        read_prompts(str(tmp_path / "a.csv"), "prompt:ask")
    for name in ("b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text('{"prompt": "Hi"}\n')
    assert [p.name for p in read_prompts(str(tmp_path / "[bc].jsonl"))] == [1, 2]
    with pytest.raises(UserError, match="no such file"):
        read_prompts(str(tmp_path / "none.jsonl"))


def test_a_datasets_split_by_name(tmp_path):
    row = lambda i, same=False: {
        "chosen": f"\n\nHuman: {i}\n\nAssistant: a",
        "rejected": f"\n\nHuman: {i}\n\nAssistant: {'a' if same else 'b'}",
    }
    broken = {"chosen": "x", "rejected": "y"}
    for split, rows in (("train", [row(1), row(2)]), ("test", [row(3), broken, row(4, True)])):
        (tmp_path / "harmless-base").mkdir(exist_ok=True)
        lines = "".join(json.dumps(one) + "\n" for one in rows)
        (tmp_path / "harmless-base" / f"{split}.jsonl").write_text(lines)
    prompts, said = dataset_prompts("hhh", str(tmp_path))
    assert [p.comparison.prompt_conversation[0]["content"] for p in prompts] == ["3", "4"]
    assert said[0] == "hhh: 2 prompts of its test split"
    assert "1 rows give no prompt" in said[1]
    assert "test.jsonl:2: " in said[1]
    prompts, _ = dataset_prompts("hhh", str(tmp_path), "train", limit=1)
    assert [p.given for p in prompts] == ["\n\nHuman: 1\n\nAssistant:"]
    with pytest.raises(UserError, match="split=dev: hhh has test and train"):
        dataset_prompts("hhh", str(tmp_path), "dev")


def test_a_digest_tells_prompts_and_their_order():
    of = lambda *rows: prompts_digest(prompts_in("\n".join(map(json.dumps, rows)).encode()))
    a, b = {"prompt": "a"}, {"prompt": "b"}
    assert of(a, b) == of(a, b)
    others = [
        of(b, a),
        of(a),
        of(a, b, b),
        of(a, {"prompt": [{"role": "user", "content": "b"}]}),
        of({**a, "id": 1}, b),
    ]
    assert len({of(a, b), *others}) == 1 + len(others)


@pytest.mark.parametrize(("kind", "template"), [("GPT-2", CHATML), ("Llama 3", CHATML), ("Metaspace first", LLAMA2)])
@pytest.mark.parametrize("form", ["auto", "plain", "text"])
def test_tokens_are_those_of_training(kind, template, form):
    """The prompt's ids, with the end that a pair leaves out where it merges with an answer."""
    renderer = make_renderer(small_tokenizer(kind, template), form, LONG, LONG)
    texts = ["hello there", "what is 12 + 3", "a  b\n\n\nc  :"]
    pairs = [
        LabeledComparison(
            Comparison(
                [{"role": "user", "content": text}],
                [{"role": "assistant", "content": "46 tide"}],
                [{"role": "assistant", "content": "no"}],
                texts=(text, "46 tide", "no"),
            ),
            "A",
        )
        for text in texts
    ]
    expected = [[*one.prompt, *one.left_out] for one in render_batch(renderer, pairs)]
    assert prompt_tokens(renderer, [prompt_of(text) for text in texts]) == expected


def test_the_beginning_is_never_there_twice_and_the_end_not_at_all():
    tokenizer = bpe_tokenizer(bos=True)  # puts its begin and its end around every text
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    renderer = make_renderer(tokenizer, "text", LONG, LONG)
    for text in ("hello", f"{tokenizer.bos_token}hello"):
        (ids,) = prompt_tokens(renderer, [prompt_of(text)])
        assert ids.count(begin) == 1
        assert end not in ids
    auto = make_renderer(tokenizer, "auto", LONG, LONG)
    templated = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    (ids,) = prompt_tokens(auto, [prompt_of(templated)])
    assert tokenizer.decode(ids) == templated
    (ids,) = prompt_tokens(auto, [prompt_of("hello")])
    assert tokenizer.decode(ids) == templated


def test_a_template_that_refuses_a_prompt_is_told_with_its_line():
    renderer = make_renderer(small_tokenizer("GPT-2", LLAMA2), "auto", LONG, LONG)
    rows = b'{"prompt": "a"}\n{"prompt": "b", "system": "c"}'
    with pytest.raises(UserError, match="input:2: only user and assistant"):
        prompt_tokens(renderer, prompts_in(rows))


def test_one_row_with_messages_is_no_list_of_rows():
    """A file of a single object may hold rows in a list; messages are none."""
    (prompt,) = prompts_in(json.dumps({"prompt": HI}).encode())
    assert (prompt.given, prompt.number) == (HI, 1)
    inside = {"data": [{"prompt": "a"}, {"prompt": "b"}]}
    assert [p.given for p in prompts_in(json.dumps(inside).encode())] == ["a", "b"]


def test_prompts_alone_join_the_pairs_and_no_pair_becomes_one(tmp_path):
    """What a pair's reader leaves out stays out, so that stages that train on pairs hold out the same prompts."""
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": "e"},
            {"question": "f", "answer": "g"}, {"prompt": ""}]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = with_prompts(find_sources(str(path))).sources[0].spec.read
    found = [read(row)[1][0] for row in rows]
    assert found[0].comparison.completion_a[0]["content"] == "b"
    assert isinstance(found[1], Skip)
    assert found[2].comparison.prompt_conversation[0]["content"] == "f"
    assert found[3].reason == "empty_prompt"


def test_a_parser_answers_for_all_of_its_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "f"}\n')
    found = with_prompts(find_sources("tests.data.test_prompts:nothing", str(tmp_path / "rows.jsonl")))
    assert found.sources[0].spec.read({"question": "f"})[1][0].reason == "not_mine"


def nothing(row):
    return Skip("not_mine")
