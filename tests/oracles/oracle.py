"""A second opinion in float64 NumPy: a Llama on one unpacked sequence, and DPO on its log-probabilities."""

import numpy as np

from dpo_jax.model.config import ModelConfig
from dpo_jax.rows.build import build_rows
from dpo_jax.rows.shape import RowShape

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rope_theta=100.0,
)


def _norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def _rotate(x_THE, positions, theta):
    E = x_THE.shape[-1]
    angles = positions[:, None] * theta ** (-2.0 * np.arange(E // 2) / E)
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    a, b = x_THE[..., : E // 2], x_THE[..., E // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q_THE, k_TGE, v_TGE, window=0):
    """Causal grouped-query attention of one sequence, head by head; a token sees `window` positions, 0: all."""
    T, H, E = q_THE.shape
    repeat = H // k_TGE.shape[1]
    out = np.zeros_like(q_THE)
    for h in range(H):
        scores = q_THE[:, h] @ k_TGE[:, h // repeat].T / np.sqrt(E)
        scores[np.triu_indices(T, 1)] = -np.inf
        if window:
            scores[np.tril_indices(T, -window)] = -np.inf
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = probs / probs.sum(-1, keepdims=True) @ v_TGE[:, h // repeat]
    return out


def hidden(params, ids, c: ModelConfig):
    """Final hidden states `[T, D]` of one sequence."""
    p = _float64(params)
    x = p["embedding"][ids]
    positions = np.arange(len(ids), dtype=np.float64)
    for i in range(c.num_hidden_layers):
        a, m = ({k: v[i] for k, v in p["layers"][name].items()} for name in ("attention", "mlp"))
        h = _norm(x, p["layers"]["input_norm"]["scale"][i], c.rms_norm_eps)
        q, k, v = (np.einsum("td,dhe->the", h, a[n]) for n in "qkv")
        window = c.sliding_window if c.sliding_layers and c.sliding_layers[i] else 0
        out = attend(_rotate(q, positions, c.rope_theta), _rotate(k, positions, c.rope_theta), v, window)
        x = x + np.einsum("the,hed->td", out, a["o"])
        h = _norm(x, p["layers"]["mlp_norm"]["scale"][i], c.rms_norm_eps)
        gate = h @ m["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ m["up"])) @ m["down"]
    return _norm(x, p["final_norm"]["scale"], c.rms_norm_eps)


def logits(params, ids, c: ModelConfig):
    """Logits `[T, V]` of one sequence."""
    p = _float64(params)
    return hidden(params, ids, c) @ p.get("lm_head", p["embedding"]).T


def completion_logp(params, prompt, completion, c: ModelConfig) -> float:
    """log p(completion | prompt), summed over tokens."""
    ids = np.concatenate([prompt, completion])
    z = logits(params, ids, c)[len(prompt) - 1 : -1]
    z = z - z.max(-1, keepdims=True)
    return float((z - np.log(np.exp(z).sum(-1, keepdims=True)))[np.arange(len(completion)), completion].sum())


def _float64(tree):
    return {k: _float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


class RandomGroups:
    """Random token ids with given lengths `[N, 1+n]`: a source of groups."""

    def __init__(self, lengths, vocab=CONFIG.vocab_size, seed=0):
        rng = np.random.default_rng(seed)
        self.lengths = np.asarray(lengths, np.int32)
        self.ids = [tuple(rng.integers(0, vocab, n).astype(np.int32) for n in row) for row in self.lengths]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return self.ids[i]


def rows(groups, placed, shape: RowShape, microbatches=1):
    """A batch `[M, B, ...]` of placed groups."""
    flat = build_rows(groups, np.asarray(placed), shape)
    return flat.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]))
