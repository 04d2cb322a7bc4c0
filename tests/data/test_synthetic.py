"""The embedded default's dialogues are valid, new, learnable and not trivial; its tokenizer loses nothing."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_jax.data import synthetic

pytestmark = pytest.mark.filterwarnings("error")

TRAIN, TEST = 3000, 600
TURN = re.compile(r"\n\n(Human|Assistant): ?")


def read(directory: Path, split: str) -> list[dict[str, str]]:
    with gzip.open(directory / "synthetic" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def split_answer(transcript: str) -> tuple[str, str]:
    prompt, header, answer = transcript.rpartition("\n\nAssistant:")
    return prompt + header, answer


def answers(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(split_answer(row["chosen"])[1], split_answer(row["rejected"])[1]) for row in rows]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+|[.,?!]", text.lower())


def count_differences(rows: list[dict[str, str]], split: Callable[[str], list], vocabulary: list) -> np.ndarray:
    """How often each word is in the chosen answer, less how often it is in the rejected one; [pairs, words]."""
    index = {word: i for i, word in enumerate(vocabulary)}
    counts = np.zeros((len(rows), len(vocabulary)))
    for row, pair in enumerate(answers(rows)):
        for sign, answer in zip((1, -1), pair, strict=True):
            np.add.at(counts[row], [index[word] for word in split(answer) if word in index], sign)
    return counts


def accuracy(scores: np.ndarray) -> np.ndarray:
    """Share of pairs (axis 0) with a score above 0, a tie counting half; the better of score and -score."""
    right = (np.sign(scores) + 1).mean(axis=0) / 2
    return np.maximum(right, 1 - right)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hh")
    synthetic.write_hh(path, seed=0, train_pairs=TRAIN, test_pairs=TEST)
    return path


@pytest.fixture(scope="module")
def train(directory: Path) -> list[dict[str, str]]:
    return read(directory, "train")


@pytest.fixture(scope="module")
def test(directory: Path) -> list[dict[str, str]]:
    return read(directory, "test")


@pytest.fixture(scope="module")
def tokenizer_directory(train: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    synthetic.train_tokenizer((text for row in train for text in row.values()), path, vocab_size=2048)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_directory)


def test_same_seed_same_bytes(directory: Path, tmp_path: Path):
    synthetic.write_hh(tmp_path / "again", 0, TRAIN, TEST)
    synthetic.write_hh(tmp_path / "other", 1, TRAIN, TEST)
    names = sorted(path.name for path in (directory / "synthetic").iterdir())
    assert names == ["test.jsonl.gz", "train.jsonl.gz"]  # and no temporary file left behind
    for name in names:
        data = (directory / "synthetic" / name).read_bytes()
        assert data == (tmp_path / "again" / "synthetic" / name).read_bytes()
        assert data != (tmp_path / "other" / "synthetic" / name).read_bytes()


def test_rows_obey_the_rules_of_hh(train: list[dict[str, str]], test: list[dict[str, str]]):
    assert (len(train), len(test)) == (TRAIN, TEST)
    turn_counts = set()
    for row in train + test:
        assert set(row) == {"chosen", "rejected"}
        (before, *chosen), (_, *rejected) = (TURN.split(row[side]) for side in ("chosen", "rejected"))
        roles, turns = chosen[0::2], chosen[1::2]
        assert before == ""
        assert roles == rejected[0::2] == ["Human", "Assistant"] * (len(roles) // 2)
        assert all(turn == turn.strip() != "" for turn in turns + rejected[1::2])
        assert chosen[:-1] == rejected[:-1]
        assert chosen[-1] != rejected[-1]
        turn_counts.add(len(roles))
    assert turn_counts == {2, 4}


def test_the_english_holds_up(train: list[dict[str, str]]):
    for text in (text for row in train for text in row.values()):
        assert not re.search(r"[{}|\t]|  |\b[Aa] [aeiou]", text), text
        assert all(re.fullmatch(r"[A-Z].*[.?!]", turn) for turn in TURN.split(text)[2::2]), text


def test_held_out_prompts_are_new(train: list[dict[str, str]], test: list[dict[str, str]]):
    prompts = [{split_answer(row["chosen"])[0] for row in rows} for rows in (train, test)]
    assert [len(part) for part in prompts] == [TRAIN, TEST]
    assert not prompts[0] & prompts[1]


def test_there_are_enough_prompts(tmp_path: Path):
    synthetic.write_hh(tmp_path, seed=2, train_pairs=20_000, test_pairs=0)
    assert len({split_answer(row["chosen"])[0] for row in read(tmp_path, "train")}) == 20_000


def test_no_single_word_or_token_gives_it_away(train: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase):
    for split in (words, lambda text: tokenizer.encode(text, add_special_tokens=False)):
        vocabulary = sorted({word for pair in answers(train) for answer in pair for word in split(answer)})
        assert accuracy(count_differences(train, split, vocabulary)).max() < 0.82


def test_length_does_not_give_it_away(train: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase):
    for length in (len, lambda text: len(tokenizer.encode(text))):
        lengths = np.array([[length(answer) for answer in pair] for pair in answers(train)])
        assert accuracy(lengths[:, 0] - lengths[:, 1]) < 0.57
        assert lengths[:, 0].mean() == pytest.approx(lengths[:, 1].mean(), rel=0.06)
        assert lengths.std(axis=0).min() > 4  # both sides vary


def test_a_bag_of_words_learns_it(train: list[dict[str, str]], test: list[dict[str, str]]):
    vocabulary = sorted({word for pair in answers(train) for answer in pair for word in words(answer)})
    train_x, test_x = (count_differences(rows, words, vocabulary) for rows in (train, test))
    weights = np.zeros(len(vocabulary))
    for _ in range(150):  # logistic regression on differences, by gradient ascent
        weights += train_x.T @ (1 / (1 + np.exp(train_x @ weights))) / len(train_x)
    assert (test_x @ weights > 0).mean() > 0.97


def test_tokens_come_back_as_text(test: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase):
    odd = ["", " ", "\n", "  two  spaces\n\n\tand a tab ", "\r\n", "naïve café 東京 🙂", "\n\nHuman:\n\nAssistant: <s"]
    for text in [text for row in test for text in row.values()] + odd:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids[1:]) == text


def test_prompt_and_answer_tokens_add_up(test: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase):
    for row in test:
        for text in row.values():
            prompt, answer = split_answer(text)
            assert tokenizer.encode(prompt) + tokenizer.encode(answer, add_special_tokens=False) == tokenizer.encode(
                text
            )


def test_both_tokenizer_files_agree(
    test: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, tokenizer_directory: Path
):
    trained = spm.SentencePieceProcessor(model_file=str(tokenizer_directory / "tokenizer.model"))
    for text in [text for row in test for text in row.values()] + ["Zürich, 1999:\n\n  x"]:
        assert tokenizer.encode(text, add_special_tokens=False) == trained.encode(text)


def test_special_tokens_and_size(tokenizer: PreTrainedTokenizerBase):
    names = ("unk_token", "bos_token", "eos_token", "pad_token")
    assert [getattr(tokenizer, name) for name in names] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert [getattr(tokenizer, f"{name}_id") for name in names] == [0, 1, 2, 3]
    assert len(tokenizer) == tokenizer.vocab_size == 2048
    assert tokenizer.decode([1, *tokenizer.encode(" yes"), 2], skip_special_tokens=True) == " yes"


def test_an_exported_llama_loads_the_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, tokenizer_directory: Path, tmp_path: Path
):
    """A config.json with model_type llama makes AutoTokenizer prefer LlamaTokenizer, which adds a leading space."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    text = "\n\nHuman: Hi!\n\nAssistant: Hello  there."
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert exported.encode(text) == tokenizer.encode(text)
    assert exported.decode(exported.encode(text), skip_special_tokens=True) == text


def test_training_again_gives_the_same_tokenizer(
    train: list[dict[str, str]], tokenizer_directory: Path, tmp_path: Path
):
    synthetic.train_tokenizer((text for row in train for text in row.values()), tmp_path, vocab_size=2048)
    for path in tokenizer_directory.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name
