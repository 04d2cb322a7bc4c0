"""Small tokenizers of every kind that published models have, trained here, and templates' tokens added to them."""

import io
import re
import tempfile
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
BOS, EOS, PAD, UNK = "<|begin|>", "<|endoftext|>", "<|pad|>", "<|unk|>"
CORPUS = [
    "Human: hello there\n\nAssistant: hello, how are you?\n\n",
    "[INST] what is 12 + 34? [/INST] it's 46  \n",
    'a  b\n\n\nc  :  d\n \n<tool> {\'name\': "tide", "arguments": {"port": "Brest"}} </tool>\n\n',
    "user\nassistant\nsystem\nmodel\ntool\n<think>\n\n</think>\n\nAnswer in the style of a pirate. Blue, on a day.\n",
    "Ce n'est pas été, ça: où? \u4f60\u597d\uff0c\u4e16\u754c\u3002 1,000.50 \u20ac\r\n\r\n\tTab",
] * 3
# What templates write as one token: <|name|>, <name>, </name>, [NAME], and DeepSeek's wide bars.
_WRITTEN = re.compile(
    "<\\|[^|<>{}\\s]+\\|>|<\uff5c[^\uff5c<>{}\\s]+\uff5c>|</?[a-z_]+>|\\[/?[A-Z_]{3,}\\]|<[a-z_]+\\||\\|[a-z_]+>"
)


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python, one token a letter: as those without a fast twin."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 (transformers' own)

    def __init__(self, **options):
        self.letters = {chr(code): code for code in range(1, 256)}
        super().__init__(**options)

    @property
    def vocab_size(self):
        return 256

    def get_vocab(self):
        return {**self.letters, **self.added_tokens_encoder}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.get(token, 0)

    def _convert_id_to_token(self, index):
        return chr(index)


def byte_level(pre_tokenizer, normalizer=None, size=420):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return _fast(backend)


def split_by(pattern):
    regex = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([regex, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def metaspace(scheme, split):
    backend = tokenizers.Tokenizer(models.BPE(unk_token=UNK, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[UNK], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return _fast(backend)


def unigram():
    """T5's and XLNet's kind: NFKC, blanks in runs made one, Metaspace."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=[UNK], unk_token=UNK, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return _fast(backend)


def prepending():
    """Llama 2's legacy kind: no pre-tokenizer, "\u2581" put before every part of the text by the normaliser."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token=UNK))
    mark = "\N{LOWER ONE EIGHTH BLOCK}"
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(" ", mark)])
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=[UNK], show_progress=False))
    return _fast(backend)


def sentence_pieces(kind, tokenizer_class, **options):
    """A model trained by SentencePiece, as transformers converts it for one of its classes."""
    model = io.BytesIO()
    lines = [line for text in CORPUS for line in text.split("\n") if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=kind, vocab_size=400, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, pad_id=3, normalization_rule_name="identity",
        remove_extra_whitespaces=False, num_threads=1, **options,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "tokenizer.model").write_bytes(model.getvalue())
        (Path(directory) / "tokenizer_config.json").write_text('{"tokenizer_class": "%s"}' % tokenizer_class)  # noqa: UP031
        (Path(directory) / "config.json").write_text("{}")
        return AutoTokenizer.from_pretrained(directory)


def _fast(backend):
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK)


def beginning(tokenizer):
    """A tokenizer that puts its BOS before every text, as Llama's do."""
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    return tokenizer


KINDS = {
    "GPT-2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "Llama 3": lambda: beginning(byte_level(split_by(LLAMA3_SPLIT))),
    "Qwen": lambda: byte_level(split_by(QWEN_SPLIT), normalizers.NFC()),
    "digits": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
    "byte-level with a prefix space": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "byte-level that merges over words": lambda: byte_level(
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ),
    "Metaspace first": lambda: beginning(metaspace("first", False)),
    "Metaspace always": lambda: metaspace("always", True),
    "Metaspace never": lambda: metaspace("never", False),
    "Unigram": unigram,
    "Prepend": lambda: beginning(prepending()),
    "SentencePiece BPE, Llama": lambda: sentence_pieces("bpe", "LlamaTokenizer"),
    "SentencePiece BPE, Gemma": lambda: sentence_pieces("bpe", "GemmaTokenizer"),
    "SentencePiece Unigram, T5": lambda: sentence_pieces("unigram", "T5Tokenizer"),
    "in Python": lambda: Letters(bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK),
}


def small_tokenizer(kind, template=None):
    """A tokenizer of that kind of its own, with a template and the tokens that it writes.

    Tokens with bars and turns are special, others (`<think>`) added, as in published models; every third swallows the
    blanks behind it, as Phi-3's do.
    """
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = template
    written = sorted(set(_WRITTEN.findall(template or "")))
    special = [text for text in written if "|" in text or "\uff5c" in text or "_" in text or "[" in text]
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip=at % 3 == 2) for at, text in enumerate(special)],
        special_tokens=True,
    )
    others = [text for text in written if text not in special]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=at % 4 == 3) for at, text in enumerate(others)])
    return tokenizer
