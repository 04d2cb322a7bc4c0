"""How our parameter tree and a Hugging Face checkpoint's tensors correspond, for every family; used both ways.

Letters: L layers, X experts, D model, F ffn, H query heads, G kv-heads, E head width, V vocabulary.
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
    # torch's Linear keeps its weight as [out, in], we keep [in, out] with the heads as an axis.
    names = [f"self_attn.{name}.weight" for name in qkv]
    return (
        _in_layer("attention.q", names[0], "LDHE", "HE", "D"),
        _in_layer("attention.k", names[1], "LDGE", "GE", "D"),
        _in_layer("attention.v", names[2], "LDGE", "GE", "D"),
        _in_layer("attention.o", "self_attn.o_proj.weight", "LHED", "D", "HE"),
    )


def _mlp(gate: str, up: str, down: str) -> tuple[Leaf, ...]:
    return (
        _in_layer("mlp.gate", f"{gate}.weight", "LDF", "F", "D"),
        _in_layer("mlp.up", f"{up}.weight", "LDF", "F", "D"),
        _in_layer("mlp.down", f"{down}.weight", "LFD", "D", "F"),
    )


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Leaf, ...]:
    return (
        _in_layer("mlp.router", f"{block}.gate.weight", "LDX", "X", "D"),
        _in_layer("mlp.gate", f"{block}.experts.{{}}.{gate}.weight", "LXDF", "F", "D"),
        _in_layer("mlp.up", f"{block}.experts.{{}}.{up}.weight", "LXDF", "F", "D"),
        _in_layer("mlp.down", f"{block}.experts.{{}}.{down}.weight", "LXFD", "D", "F"),
    )


def _norms(**names: str) -> tuple[Leaf, ...]:
    return tuple(_in_layer(f"{ours}.scale", f"{theirs}.weight", "LD", "D") for ours, theirs in names.items())


ATTENTION = _attention(("q_proj", "k_proj", "v_proj"))
MLP = _mlp("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# What is called otherwise than Llama's, by model_type.
ATTENTIONS = {"phi3": _attention(("qkv_proj",) * 3)}
MLPS = {
    "phi3": _mlp("mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "mixtral": _experts("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": _experts("mlp", "gate_proj", "up_proj", "down_proj"),
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
QKV_BIASES = (
    _in_layer("attention.q_bias", "self_attn.q_proj.bias", "LHE", "HE"),
    _in_layer("attention.k_bias", "self_attn.k_proj.bias", "LGE", "GE"),
    _in_layer("attention.v_bias", "self_attn.v_proj.bias", "LGE", "GE"),
)
O_BIAS = _in_layer("attention.o_bias", "self_attn.o_proj.bias", "LD", "D")
QK_NORMS = {
    "": (),
    "head": (
        _in_layer("attention.q_norm.scale", "self_attn.q_norm.weight", "LE", "E"),
        _in_layer("attention.k_norm.scale", "self_attn.k_norm.weight", "LE", "E"),
    ),
    "projection": (
        _in_layer("attention.q_norm.scale", "self_attn.q_norm.weight", "LHE", "HE"),
        _in_layer("attention.k_norm.scale", "self_attn.k_norm.weight", "LGE", "GE"),
    ),
}
EMBEDDING = Leaf(("embedding",), "model.embed_tokens.weight", "VD", ("V", "D"))
FINAL_NORM = Leaf(("final_norm", "scale"), "model.norm.weight", "D", ("D",))
LM_HEAD = Leaf(("lm_head",), "lm_head.weight", "VD", ("V", "D"))


def model_leaves(config: ModelConfig) -> list[Leaf]:
    """The leaves this model has: no `lm_head` where embeddings are tied, biases where it has them, ..."""
    c = config
    found = [EMBEDDING, *NORMS[c.norms], *ATTENTIONS.get(c.model_type, ATTENTION)]
    found += QKV_BIASES * c.attention_bias + (O_BIAS,) * c.output_bias + QK_NORMS[c.qk_norm]
    found += [*MLPS.get(c.model_type, MLP), FINAL_NORM]
    return found if c.tie_word_embeddings else [*found, LM_HEAD]


def sizes(config: ModelConfig) -> Sizes:
    """The letters' sizes."""
    c = config
    return {
        "L": c.num_hidden_layers, "X": c.num_experts, "D": c.hidden_size, "F": c.intermediate_size,
        "V": c.vocab_size, "H": c.num_attention_heads, "G": c.num_key_value_heads, "E": c.head_dim,
    }  # fmt: skip


Parts = list[tuple[Leaf, tuple[int, ...]]]  # leaf, and which (layer, expert) of it


def tensors(config: ModelConfig) -> dict[str, Parts]:
    """Every tensor of the checkpoint and what it holds, one below the other; layer by layer as a reader wants them."""
    letters = sizes(config)
    found: dict[str, Parts] = {}
    every = model_leaves(config)
    stacked = [leaf for leaf in every if leaf.stacked]
    order: Parts = [(EMBEDDING, ())]
    for layer in range(config.num_hidden_layers):
        order += [(leaf, index) for leaf in stacked for index in leaf.indices(letters) if index[0] == layer]
    order += [(leaf, ()) for leaf in every if not leaf.stacked and leaf != EMBEDDING]
    for leaf, index in order:
        found.setdefault(leaf.name.format(*index), []).append((leaf, index))
    return found


def whole_shape(parts: Parts, letters: Sizes) -> tuple[int, ...]:
    """The shape of a tensor that holds these."""
    shapes = [leaf.tensor_shape(letters) for leaf, _ in parts]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def first_rows(config: ModelConfig) -> dict[tuple[str, ...], int]:
    """By a leaf's path: how many rows of its tensor belong to leaves before it."""
    letters, used, found = sizes(config), dict[str, int](), dict[tuple[str, ...], int]()
    for leaf in model_leaves(config):
        found[leaf.path] = used.get(leaf.name, 0)
        used[leaf.name] = found[leaf.path] + leaf.tensor_shape(letters)[0]
    return found
