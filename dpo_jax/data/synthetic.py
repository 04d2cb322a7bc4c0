"""The embedded default: made-up dialogues in Anthropic HH's transcript form, and a tokenizer trained on them.

Answers come in three grades: helpful (courteous, on the point), plain (on the topic, but lazy) and rude (hostile or
beside the point). A pair sets a better grade against a worse one, so a plain answer is sometimes the chosen one: SFT on
chosen answers still leaves some laziness for DPO to remove, and no single word tells the sides apart.
"""

import gzip
import io
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece as spm
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from dpo_jax.disk import read_json, write_whole

MULTI_TURN_FRACTION = 0.35
SCENE_FRACTION = 0.75  # of the dialogues with one turn, those that begin by setting the scene

# The grammar. `contrasts`: a better grade, a worse one, and how often they meet. `sentences`: the kinds that an answer
# of a grade is made of, and how often each is there, so that all grades are about equally long. `topics`, and `phrases`
# that fit every topic: every advice of an ask answers each of its questions with each of its tips. No thing starts with
# a vowel, so "a {thing}" is always right. The grades share words on purpose ("help", "good luck", "ask me again").
GRAMMAR = Path(__file__).with_suffix(".json")


def write_hh(directory: Path, seed: int, train_pairs: int, test_pairs: int) -> None:
    """Writes `directory/synthetic/{train,test}.jsonl.gz`, rows as in Anthropic HH; the same seed gives the same bytes.

    No two pairs share a prompt, so every held-out prompt is new.
    """
    rng = random.Random(seed)
    grammar = read_json(GRAMMAR)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < train_pairs + test_pairs:
        prompt, chosen, rejected = _pair(rng, rng.choice(grammar["topics"]), grammar)
        rows.setdefault(prompt, {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"})
    (directory / "synthetic").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    for split, part in (("train", lines[:train_pairs]), ("test", lines[train_pairs:])):
        data = gzip.compress("".join(part).encode(), mtime=0)  # a time stamp would make every run's bytes differ
        write_whole(directory / "synthetic" / f"{split}.jsonl.gz", data)


def train_tokenizer(texts: Iterable[str], directory: Path, vocab_size: int) -> None:
    """Trains a SentencePiece BPE tokenizer with byte fallback; `AutoTokenizer.from_pretrained(directory)` loads it.

    Any text comes back exactly (but for a literal U+2581, which is read as a space, as in Llama 2), and no token
    reaches across a space: the tokens of `prompt + " answer"` are those of `prompt`, then those of `" answer"`.
    """
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=3,  # after <unk>, <s> and </s>
        max_sentence_length=1 << 20,  # bytes; longer texts would be left out without a word
        num_threads=1,  # the same pieces on every machine
        # The defaults fold newlines and runs of spaces, and put a space in front of every text.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is; LlamaTokenizer would rebuild it
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "tokenizer.model", model.getvalue())
    write_whole(directory / "tokenizer.json", _to_tokenizers(model.getvalue()).to_str(pretty=True))
    write_whole(directory / "tokenizer_config.json", json.dumps(config, indent=2))


def _to_tokenizers(model: bytes) -> Tokenizer:
    """The same tokenizer as a Hugging Face one: transformers' own conversion would add a leading space."""
    trained = spm.SentencePieceProcessor(model_proto=model)
    pieces = [trained.id_to_piece(i) for i in range(trained.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    special = pieces[: trained.pad_id() + 1]
    known = {piece for i, piece in enumerate(pieces) if i >= len(special) and not trained.is_byte(i)}
    # Pieces come in the order they were learned, which is the order in which their halves merge.
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if {piece, piece[:i], piece[i:]} <= known
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    return tokenizer


def _pair(rng: random.Random, topic: dict[str, Any], grammar: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt (it ends with "Assistant:"), better answer, worse answer."""
    slots = {"thing": rng.choice(topic["things"]), "when": rng.choice(topic["whens"])}
    turns = 2 if rng.random() < MULTI_TURN_FRACTION else 1
    asks = rng.sample(topic["asks"], turns)
    opening = [rng.choice(("", *grammar["phrases"]["greeting"]))]
    if turns == 1 and rng.random() < SCENE_FRACTION:
        opening.append(topic["scene"])
    prompt = "\n\nHuman: " + _join([*opening, rng.choice(asks[0]["questions"])], slots)
    if turns == 2:
        grade = rng.choices(("helpful", "plain"), (0.7, 0.3))[0]
        question = [rng.choice(grammar["phrases"]["link"]), rng.choice(asks[1]["questions"])]
        prompt += f"\n\nAssistant: {_answer(rng, grade, asks[0], slots, grammar)}\n\nHuman: {_join(question, slots)}"
    better, worse, _ = rng.choices(grammar["contrasts"], [share for *_, share in grammar["contrasts"]])[0]
    chosen, rejected = (_answer(rng, grade, asks[-1], slots, grammar) for grade in (better, worse))
    return f"{prompt}\n\nAssistant:", chosen, rejected


def _answer(
    rng: random.Random, grade: str, ask: dict[str, list[str]], slots: dict[str, str], grammar: dict[str, Any]
) -> str:
    """An answer of this grade; it names one of the ask's tips, as a worse one may, too."""
    choices = {**grammar["phrases"], "advice": ask["advice"], "tip": ask["tips"]}
    kinds = grammar["sentences"][grade]
    sentences = [rng.choice(choices[kind]) for kind, share in kinds.items() if rng.random() < share]
    return _join(sentences, slots | {slot: rng.choice(choices[slot]) for slot in ("tip", "who", "habit")})


def _join(sentences: list[str], slots: dict[str, str]) -> str:
    """Fills the slots and puts the sentences together, each with a capital first letter; empty ones vanish."""
    filled = [sentence.format(**slots) for sentence in sentences if sentence]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in filled)
