"""How our parameter tree and a Hugging Face checkpoint's tensors correspond, for every family; used both ways.

Letters: L layers, X experts, D model, F ffn, H query heads, G kv-heads, E head width, V vocabulary, O the one output of
a reward model.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

from dpo_jax.model.config import ModelConfig

Sizes = Mapping[str, int]  # of the letters


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of our tree and the tensor (one per layer and expert, if it has axes L and X before) that holds it.

    Several leaves may name the same tensor: it holds them one below the other, in the order of `leaves`.
    """

    path: tuple[str, ...]
    name: str  # the tensor; the first {} is the layer, the second the expert
    ours: str  # our axes
    theirs: tuple[str, ...]  # the tensor's axes; two letters are two of our axes in one

    @property
    def stacked(self) -> str:
        """Our first axes, of each entry of which there is a tensor of its own."""
        return self.ours[: len(self.ours) - len("".join(self.theirs))]

    @property
    def axes(self) -> str:
        """Our axes within one tensor."""
        return self.ours[len(self.stacked) :]

    def indices(self, sizes: Sizes) -> Iterator[tuple[int, ...]]:
        """(layer, expert) of every tensor; an empty tuple if there is only one."""
        return itertools.product(*(range(sizes[letter]) for letter in self.stacked))

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(sizes[letter] for letter in self.ours)

    def tensor_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Of the tensor; of our part of it, where several leaves share it."""
        return tuple(math.prod(sizes[letter] for letter in axis) for axis in self.theirs)


def _in_layer(path: str, name: str, ours: str, *theirs: str) -> Leaf:
    return Leaf(("layers", *path.split(".")), f"model.layers.{{}}.{name}", ours, theirs)


def _attention(qkv: tuple[str, str, str]) -> tuple[Leaf, ...]:
    # torch's Linear keeps its weight as [out, in], we keep [in, out] with the heads (N: H or G) as an axis.
    projections = (
        _in_layer(f"attention.{x}", f"self_attn.{name}.weight", f"LD{N}E", f"{N}E", "D")
        for x, name, N in zip("qkv", qkv, "HGG", strict=True)
    )
    return (*projections, _in_layer("attention.o", "self_attn.o_proj.weight", "LHED", "D", "HE"))


def _feed_forward(kernels: str, names: tuple[str, str, str], router: str = "") -> tuple[Leaf, ...]:
    """Gate, up and down projection, of `kernels`; with a router they are those of every expert."""
    each, (gate, up, down) = "LX" if router else "L", (f"{kernels}.{name}.weight" for name in names)
    routers = [_in_layer("mlp.router", f"{router}.weight", "LDX", "X", "D")] if router else []
    return (
        *routers,
        _in_layer("mlp.gate", gate, f"{each}DF", "F", "D"),
        _in_layer("mlp.up", up, f"{each}DF", "F", "D"),
        _in_layer("mlp.down", down, f"{each}FD", "D", "F"),
    )


def _norms(**names: str) -> tuple[Leaf, ...]:
    return tuple(_in_layer(f"{ours}.scale", f"{theirs}.weight", "LD", "D") for ours, theirs in names.items())


def _qk_norms(query: str, key: str) -> tuple[Leaf, ...]:
    """`query`, `key`: our axes of one layer's scale, which are one axis of the tensor."""
    names = {"q_norm": query, "k_norm": key}
    return tuple(_in_layer(f"attention.{x}.scale", f"self_attn.{x}.weight", f"L{E}", E) for x, E in names.items())


ATTENTION = _attention(("q_proj", "k_proj", "v_proj"))
MLP = _feed_forward("mlp", ("gate_proj", "up_proj", "down_proj"))
# What is called otherwise than Llama's, by model_type.
ATTENTIONS = {"phi3": _attention(("qkv_proj",) * 3)}
MLPS = {
    "phi3": _feed_forward("mlp", ("gate_up_proj", "gate_up_proj", "down_proj")),
    "mixtral": _feed_forward("block_sparse_moe.experts.{}", ("w1", "w3", "w2"), "block_sparse_moe.gate"),
    "qwen3_moe": _feed_forward("mlp.experts.{}", ("gate_proj", "up_proj", "down_proj"), "mlp.gate"),
}
NORMS = {
    "pre": _norms(input_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    "post": _norms(attention_out_norm="post_attention_layernorm", mlp_out_norm="post_feedforward_layernorm"),
    "both": _norms(
        input_norm="input_layernorm",
        attention_out_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_out_norm="post_feedforward_layernorm",
    ),
}
QKV_BIASES = tuple(
    _in_layer(f"attention.{x}_bias", f"self_attn.{x}_proj.bias", f"L{N}E", f"{N}E")
    for x, N in zip("qkv", "HGG", strict=True)
)
O_BIAS = _in_layer("attention.o_bias", "self_attn.o_proj.bias", "LD", "D")
QK_NORMS = {"": (), "head": _qk_norms("E", "E"), "projection": _qk_norms("HE", "GE")}
EMBEDDING = Leaf(("embedding",), "model.embed_tokens.weight", "VD", ("V", "D"))
FINAL_NORM = Leaf(("final_norm", "scale"), "model.norm.weight", "D", ("D",))
LM_HEAD = Leaf(("lm_head",), "lm_head.weight", "VD", ("V", "D"))
SCORE = Leaf(("score",), "score.weight", "OD", ("O", "D"))


def model_leaves(config: ModelConfig) -> list[Leaf]:
    """The leaves this model has: no `lm_head` where embeddings are tied, a `score` of a reward model, ..."""
    c = config
    attention, feed_forward = ATTENTIONS.get(c.model_type, ATTENTION), MLPS.get(c.model_type, MLP)
    biases = QKV_BIASES * c.attention_bias + (O_BIAS,) * c.output_bias
    head = (SCORE,) if c.scalar_head else () if c.tie_word_embeddings else (LM_HEAD,)
    return [EMBEDDING, *NORMS[c.norms], *attention, *biases, *QK_NORMS[c.qk_norm], *feed_forward, FINAL_NORM, *head]


def sizes(config: ModelConfig) -> Sizes:
    """The letters' sizes."""
    c = config
    return {
        "L": c.num_hidden_layers, "X": c.num_experts, "D": c.hidden_size, "F": c.intermediate_size,
        "V": c.vocab_size, "H": c.num_attention_heads, "G": c.num_key_value_heads, "E": c.head_dim, "O": 1,
    }  # fmt: skip


Parts = list[tuple[Leaf, tuple[int, ...]]]  # leaf, and which (layer, expert) of it


def tensors(config: ModelConfig) -> dict[str, Parts]:
    """Every tensor of the checkpoint and what it holds, one below the other; layer by layer as a reader wants them."""
    letters = sizes(config)
    every = [(leaf, index) for leaf in model_leaves(config) for index in leaf.indices(letters)]
    layer_of = lambda part: part[1][0] if part[1] else -1 if part[0] == EMBEDDING else config.num_hidden_layers
    held: dict[str, Parts] = {}
    for leaf, index in sorted(every, key=layer_of):
        held.setdefault(leaf.name.format(*index), []).append((leaf, index))
    return held


def whole_shape(parts: Parts, letters: Sizes) -> tuple[int, ...]:
    """The shape of a tensor that holds these."""
    shapes = [leaf.tensor_shape(letters) for leaf, _ in parts]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def first_rows(config: ModelConfig) -> dict[tuple[str, ...], int]:
    """By a leaf's path: how many rows of its tensor belong to leaves before it."""
    letters, used, first = sizes(config), dict[str, int](), dict[tuple[str, ...], int]()
    for leaf in model_leaves(config):
        first[leaf.path] = used.get(leaf.name, 0)
        used[leaf.name] = first[leaf.path] + leaf.tensor_shape(letters)[0]
    return first
