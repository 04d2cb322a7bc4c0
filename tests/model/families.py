"""What the tests of the model families share: real text as token ids, packed rows of it, our side of a comparison."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.model.config import ModelConfig
from dpo_jax.model.forward import ModelOptions, hidden_states, unembedding
from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.placement import place_model
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.rows.batch import Batch
from dpo_jax.rows.build import build_rows
from dpo_jax.rows.shape import RowShape
from dpo_jax.sampling.engine import Sampler
from dpo_jax.sampling.params import SamplingParams
from dpo_jax.weights import huggingface as weights
from tests import places

GOLDEN = places.GOLDEN / "transformers"
STORIES = [p / "shared/data/stories260k" for p in Path(__file__).parents if (p / "shared/data/stories260k").is_dir()]
TEXTS = [
    ("Once upon a time, a small bird lived in a tall tree near the river.", "She sang every morning.", "It was red."),
    ("Tom asked his mother whether the moon follows people home at night.", "She laughed and said that it only "
     "looks that way.", "Yes, it does so because it likes you."),
    ("The old sailor looked at the grey clouds and told the boys a story.", "They listened until dark.", "No ship "
     "ever came back, he said, and nobody knows why."),
]  # fmt: skip
# Lengths in tokens (texts are cut or repeated); every sequence is longer than any window of the tests.
CUTS = ((30, 9, 12), (19, 15, 6), (25, 11, 16))
SHAPE = RowShape(64, (32, 32), rows=2, places=3)
PLACED = np.array([[2, 0, -1], [1, -1, -1]])


def sweep(names, *quick):
    """Parameters of a test: all names, those that are not `quick` marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def greedy(config: ModelConfig, params, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The most likely token, so many times, of our sampler; nothing stops an answer."""
    layout = place_model(config, make_mesh(1, 1, 1, jax.devices()[:1]), LayoutOptions(compute_dtype="float32"))
    asked = SamplingParams(temperature=0.0, max_tokens=tokens)
    return [answer.token_ids for (answer,) in Sampler(layout, None, [-1]).answers(params, prompts, asked)]


def token_ids(text: str, vocab: int) -> np.ndarray:
    """Real text as token ids: of the stories tokenizer where it lies beside the project, else its bytes."""
    if STORIES and vocab >= 512:
        import sentencepiece

        return np.array(sentencepiece.SentencePieceProcessor(str(STORIES[0] / "tokenizer.model")).encode(text))
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32) % vocab


class TextPairs:
    """The texts as pairs of token ids: a source of pairs."""

    def __init__(self, vocab: int):
        self.ids = [
            tuple(np.resize(token_ids(text, vocab), n).astype(np.int32) for text, n in zip(texts, cut, strict=True))
            for texts, cut in zip(TEXTS, CUTS, strict=True)
        ]
        self.lengths = np.array([[len(x) for x in pair] for pair in self.ids])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int):
        return self.ids[i]

    def sequences(self) -> list[np.ndarray]:
        """prompt + chosen and prompt + rejected of every pair."""
        return [np.concatenate([p, x]) for p, *completions in self.ids for x in completions]


def batch(pairs: TextPairs) -> tuple[Batch[jax.Array], RowShape]:
    """All pairs in two rows: the first row holds two of them."""
    return build_rows(pairs, PLACED, SHAPE).map(jnp.asarray), SHAPE


def capped(logits, config: ModelConfig):
    cap = config.final_logit_softcapping
    return cap * jnp.tanh(logits / cap) if cap else logits


@functools.partial(jax.jit, static_argnames=("config", "slots", "dtype", "remat"))
def row_logits(params, rows, config, slots, dtype=jnp.float32, remat="none") -> jax.Array:
    """Logits `[B, T, V]` of rows."""
    hidden = hidden_states(params, rows, slots, ModelOptions(config, dtype, remat))[0].astype(jnp.float32)
    return capped(jnp.einsum("BTD,VD->BTV", hidden, unembedding(params), precision="highest"), config)


def sequence_rows(sequences: list[np.ndarray]) -> tuple[Batch[jax.Array], RowShape]:
    """Plain sequences as rows that are all prompt, padded on the right; of one shape, so that it compiles once."""
    assert len(sequences) <= 2 * len(CUTS)
    sequences = [*sequences, *([np.zeros(0, np.int32)] * (2 * len(CUTS) - len(sequences)))]
    T = 48
    tokens = np.stack([np.pad(x, (0, T - len(x))) for x in sequences]).astype(np.int32)
    real = np.stack([np.arange(T) < len(x) for x in sequences])
    rows = (jnp.asarray(x, jnp.int32) for x in (tokens, real, np.where(real, np.arange(T), 0)))
    none = jnp.zeros((len(tokens), 0), jnp.int32)
    return Batch(*rows, source=none, is_group=none, completion_tokens=none), RowShape(T, (0,))


def sequence_logits(params, config: ModelConfig, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Logits `[T, V]` of plain sequences."""
    rows, slots = sequence_rows(sequences)
    found = np.asarray(row_logits(params, rows, config, slots))
    return [x[: len(ids)] for x, ids in zip(found, sequences, strict=False)]


def unpacked(per_token, rows: Batch, slots: RowShape) -> list[np.ndarray]:
    """What rows hold per token, as the unpacked sequences of `TextPairs.sequences`."""
    per_token, segments = np.asarray(per_token), np.asarray(rows.segments)
    slot = np.repeat([0, 1, 2], slots.widths)
    found = {}
    for (b, k), pair in np.ndenumerate(PLACED):
        for side in (1, 2):
            mine = (segments[b] == k + 1) & ((slot == 0) | (slot == side))
            found[pair, side] = per_token[b, mine]
    return [found[pair, side] for pair in range(len(CUTS)) for side in (1, 2)]


def load(directory: Path, config: ModelConfig, dtype=jnp.float32):
    return weights.load_weights(directory, config, jax.sharding.SingleDeviceSharding(jax.devices()[0]), dtype)


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
