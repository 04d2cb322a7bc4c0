"""Where a text may be cut so that its parts, tokenised apart, have the ids of the whole; and the ids of pairs by that.

Most of a pair's text is its prompt, which stands three times in it: alone, and before each answer. It is tokenised once
wherever that is certain to change no id. Two cuts are; without one the whole texts are tokenised:

- Before an added token that the tokenizer takes out of the text before it normalises and splits the rest
  (`normalized=False`): what stands on either side of such a token is tokenised apart anyway. The token must be found
  wherever its text stands: no other added token can overlap it or begin with it, and neither its neighbours
  (`single_word`) nor blanks before it (`lstrip`) have a say.
- Between ":" and " ", where a transcript's answer begins, for byte-level tokenizers that split a text by one of
  `_SPLITS` before they merge: none of these patterns matches ": " or looks back, and what they match before it does not
  depend on what follows it.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpo_jax.errors import UserError

Ids = list[int]

_NEAR = 300  # characters before the answers in which a token to cut at is looked for
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = (_GPT2, _LLAMA3, _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"))  # the last is Qwen's


@dataclass(frozen=True)
class Cuts:
    """The sure cuts of a tokenizer: `marks` matches the added tokens, `colon`: between ":" and " "."""

    marks: re.Pattern[str] | None = None
    colon: bool = False

    def place(self, prompt: str, chosen: str, rejected: str) -> int:
        """The last place at which all three texts, equal up to there and a little further, may be cut; 0 is none."""
        shared, far = len(prompt), len(prompt) + 1
        if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
            shared = len(os.path.commonprefix([prompt, chosen, rejected]))  # noqa: RUF071 (texts, not paths)
        elif self.colon and prompt.endswith(":") and chosen[shared:far] == rejected[shared:far] == " ":
            return shared
        last = 0
        for match in self.marks.finditer(prompt, max(0, shared - _NEAR), shared) if self.marks else ():
            last = match.start()
        return last


class Trio(NamedTuple):
    """Prompt and whole texts (prompt with answer), and the ids that stand around each of them."""

    prompt: str
    chosen: str
    rejected: str
    leading: tuple[int, ...] = ()
    trailing: tuple[int, ...] = ()


class TrioIds(NamedTuple):
    """Ids of prompt and answers; `left_out` is the end of the prompt's own ids that the whole texts do not have."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    left_out: Ids


def sure_cuts(tokenizer: Any, templates: Iterable[str]) -> Cuts:
    """The cuts that change no id of this tokenizer; `templates` are its chat templates, whose tokens are cut at."""
    backend = _plain_backend(tokenizer)
    if backend is None:
        return Cuts()
    added = list(backend.get_added_tokens_decoder().values())
    texts = [token.content for token in added]
    written = "\n".join([*templates, *tokenizer.all_special_tokens])
    free = [token for token in added if not (token.normalized or token.single_word or token.lstrip)]
    marks = [
        token.content
        for token in free
        if token.content.strip()[:1] == token.content[:1] != "" and token.content in written
        if not any(_overlap(other, token.content) for other in texts)
    ]
    # A token that holds the cut, or that swallows the blank behind it, is in its way.
    blocked = any(": " in token.content or (token.rstrip and token.content.endswith(":")) for token in added)
    rules = json.loads(backend.to_str())
    colon = not blocked and (rules["normalizer"] or {}).get("type", "NFC") == "NFC" and _splits(rules["pre_tokenizer"])
    return Cuts(re.compile("|".join(map(re.escape, marks))) if marks else None, colon)


def encode(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """Ids of every text without special tokens around them.

    Raises:
      UserError: the tokenizer fails on a text, as one does whose patterns take for ever.
    """
    try:
        return _encode(tokenizer, texts) if texts else []
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, which is no Exception
            raise
        words = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer {tokenizer.name_or_path} fails on a text ({words}); give another one") from None


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    if (backend := _plain_backend(tokenizer)) is not None:
        # What transformers does, but for the places of the tokens in the text, which nothing here asks for and which
        # take an eighth of the time.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens:
            backend.encode_special_tokens = False
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def encode_trios(tokenizer: Any, cuts: Cuts, trios: Sequence[Trio]) -> list[TrioIds]:
    """Ids of every pair as TRL 1.16 has them, in one call of the tokenizer.

    The answers begin where the ids of a whole text first differ from the prompt's, both at the same token (TRL's
    `common_prefix_length`).
    """
    places = [cuts.place(*trio[:3]) for trio in trios]
    wanted = [(trio[0], *(text[at:] for text in trio[:3])) for trio, at in zip(trios, places, strict=True)]
    each = list(dict.fromkeys(text for texts in wanted for text in texts))
    pieces = dict(zip(each, encode(tokenizer, each), strict=True))
    found = []
    for trio, texts in zip(trios, wanted, strict=True):
        prompt, tail, chosen, rejected = ([*pieces[text], *trio.trailing] for text in texts)
        prompt = [*trio.leading, *prompt]
        # Without a cut the tail is the whole prompt's, and the leading ids are common to all.
        same = min(_common(tail, chosen), _common(tail, rejected))
        start = len(prompt) - len(tail) + same
        found.append(TrioIds(prompt[:start], chosen[same:], rejected[same:], prompt[start:]))
    return found


def _common(ids: Ids, other: Ids) -> int:
    """Number of tokens with which both begin."""
    if other[: len(ids)] == ids:
        return len(ids)
    return next(at for at, token in enumerate(ids) if at >= len(other) or token != other[at])


def _overlap(other: str, token: str) -> bool:
    """Whether `other`, found in a text, can hide a `token` that begins in it, or is found where `token` begins."""
    if other != token and other.startswith(token):
        return True
    return token[0] in other[1:] and any(
        other[at:].startswith(token) or token.startswith(other[at:]) for at in range(1, len(other))
    )


def _plain_backend(tokenizer: Any) -> Any:
    """The backend if a text goes to it as it is: no class of a single model has code of its own in between; else None.

    None, too, where the texts of special tokens are split like any other.
    """
    for method in ("__call__", "_encode_plus"):
        owner = next((one for one in type(tokenizer).__mro__ if method in vars(one)), None)
        if owner is None or not owner.__module__.startswith("transformers.tokenization_utils"):
            return None
    split = getattr(tokenizer, "split_special_tokens", False)
    return None if split else getattr(tokenizer, "backend_tokenizer", None)


def _splits(rules: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer splits every text by one of `_SPLITS`, and otherwise digits from the rest at most."""
    steps = (rules or {}).get("pretokenizers", [rules or {}])
    cut = False
    for step in steps:
        if step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
            cut = cut or step["use_regex"]
        elif step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            if step["pattern"].get("Regex") not in _SPLITS:
                return False
            cut = True
        elif step.get("type") != "Digits":
            return False
    return cut
