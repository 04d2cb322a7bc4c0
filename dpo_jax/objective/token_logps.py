"""Log-probabilities of given tokens, and divergences of distributions, through a vocabulary that is sharded.

See `vocabulary.py` for how: logits are never held whole, neither on one device nor for all tokens.

Shapes: B rows, N completion tokens of a row, n of them in a chunk, D model, V vocabulary (v: a device's part of it, s:
a block of that).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dpo_jax.model.vocabulary import CHUNK_TOKENS, chunks_of, division, joined, table_parts
from dpo_jax.parallel.spread import Spread

# The logit of a row of padding: its exponential is 0 beside a token's, and where a device has nothing but padding its
# difference from the largest is 0, where that of -inf would be no number.
PADDING = -1e30


@dataclasses.dataclass(frozen=True)
class LogpOptions:
    """How log-probabilities are computed.

    Attributes:
      chunk_tokens: about how many tokens' logits are held at once, for each device that shares the rows; in blocks, the
        logits of as many more tokens, for as many fewer of the vocabulary.
      block: about how many of the vocabulary's tokens a device goes through at a time; None is all of its part. A CPU
        has the logits of a block in its caches.
      softcap: logits become softcap·tanh(logits/softcap) (Gemma 2, arXiv 2408.00118); None leaves them.
      temperature: logits are then divided by it: of the distribution that answers are drawn from at this temperature.
      log_sum_sq: whether to compute log Σ_v p(v)² of every distribution in the same pass, without a gradient.
      entropy: whether to compute −Σ_v p(v) log p(v) of every distribution in the same pass, without a gradient.
    """

    chunk_tokens: int = CHUNK_TOKENS
    block: int | None = None
    softcap: float | None = None
    temperature: float = 1.0
    log_sum_sq: bool = False
    entropy: bool = False


class TokenValues(NamedTuple):
    """What is known of every token, float32 `[B, N]`: its log-probability, and what `LogpOptions` asks for besides."""

    logps: jax.Array
    log_sum_sq: jax.Array | None = None
    entropy: jax.Array | None = None


def token_logps(hidden_BND: jax.Array, targets_BN: jax.Array, table_VD: jax.Array, options: LogpOptions) -> TokenValues:
    """log p(target | hidden) for every token, computed in chunks whose logits the backward pass makes again.

    Args:
      hidden_BND: the hidden states that predict the targets.
      targets_BN, table_VD: int32 token ids, and the vocabulary projection.

    Returns:
      Their values.
    """
    if hidden_BND.shape[1] == 0:
        empty = jnp.zeros(targets_BN.shape, jnp.float32)
        return TokenValues(empty, *(empty if asked else None for asked in (options.log_sum_sq, options.entropy)))
    spread = Spread.of(targets_BN.shape[0])
    return _token_logps(hidden_BND, targets_BN, table_parts(table_VD, spread), options, spread, len(table_VD))


def token_kl(hidden: Sequence[jax.Array], tables: Sequence[jax.Array], *, softcap: float | None = None) -> jax.Array:
    """KL(p ‖ q) = Σ_v p(v)·(log p(v) - log q(v)) of every token's distributions, float32 `[B, N]`; without a gradient.

    In chunks of tokens, and every device with its own part of the vocabulary, as log-probabilities are computed.

    Args:
      hidden: `[B, N, D]` each, the hidden states of p and of q.
      tables: `[V, D]` each, their vocabulary projections.
      softcap: as in `LogpOptions`.
    """
    B, N, _ = hidden[0].shape
    spread, size = Spread.of(B), len(tables[0])
    tables = [table_parts(table_VD, spread) for table_VD in tables]

    def local(hidden: Sequence[jax.Array], tables: Sequence[jax.Array]) -> jax.Array:
        own_rows = hidden[0].shape[0]
        real_v = _real(spread, len(tables[0]), size, 0, len(tables[0]))

        def log_probs(h_BnD: jax.Array, table_vD: jax.Array) -> jax.Array:
            logits = _logits(spread.gather(h_BnD), table_vD, softcap, real_v)
            largest = spread.vocab_max(jnp.max(logits, axis=-1))
            total = spread.vocab_sum(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
            return logits - (largest + jnp.log(total))[..., None]

        def body(_, chunk):
            ours, theirs = (log_probs(h, table) for h, table in zip(chunk, tables, strict=True))
            kl_Bn = spread.vocab_sum(jnp.sum(jnp.exp(ours) * (ours - theirs), axis=-1))
            return None, spread.own_rows(jnp.maximum(kl_Bn, 0.0), own_rows)

        chunks, n = _split(own_rows, N, CHUNK_TOKENS // 2, 1)  # two models' logits
        return joined(jax.lax.scan(body, None, tuple(chunks_of(h, chunks, n) for h in hidden))[1], N)

    rows, vocab = P(spread.rows or None), P(spread.vocab or None)
    return spread.on_mesh(local, ((rows, rows), (vocab, vocab)), rows)(tuple(hidden), tuple(tables))


def _blocks(table_vD: jax.Array, block: int | None) -> tuple[np.ndarray, jax.Array]:
    """The table in blocks of one size `[blocks, s, D]`, and the first row of each.

    Their size is the divisor of the table's rows that is nearest to `block`, within a factor of four; where there is
    none, the table is one block.
    """
    part, D = table_vD.shape
    size = part
    if block is not None:
        divisors = (s for s in range(max(1, block // 4), min(part, 4 * block) + 1) if part % s == 0)
        size = min(divisors, key=lambda s: max(s / block, block / s), default=part)
    return np.arange(0, part, size), table_vD.reshape(-1, size, D)


def _through(blocks: tuple[np.ndarray, jax.Array], carry: Any, body: Callable) -> tuple[Any, Any]:
    """`carry, out = body(carry, (first row, block))` over the blocks; of one block no loop is made."""
    if len(blocks[0]) > 1:
        return jax.lax.scan(body, carry, blocks)
    carry, out = body(carry, (int(blocks[0][0]), blocks[1][0]))
    return carry, jax.tree.map(lambda x: x[None], out)


def _real(spread: Spread, part: int, vocab: int, first: Any, size: int) -> jax.Array | None:
    """Which of `size` rows from row `first` of this device's part are tokens; None: no row of any part is padding.

    A part has `part` rows, the vocabulary `vocab` tokens.
    """
    if part * spread.size(spread.vocab) == vocab:
        return None
    return spread.offset(part) + first + jnp.arange(size) < vocab


def _logits(
    hidden_BnD: jax.Array,
    table_sD: jax.Array,
    softcap: float | None,
    real_s: jax.Array | None,
    temperature: float = 1.0,
) -> jax.Array:
    logits_Bns = jnp.einsum("BnD,vD->Bnv", hidden_BnD, table_sD, preferred_element_type=jnp.float32)
    logits_Bns = softcap * jnp.tanh(logits_Bns / softcap) if softcap else logits_Bns
    logits_Bns = logits_Bns if temperature == 1 else logits_Bns / temperature
    return logits_Bns if real_s is None else jnp.where(real_s, logits_Bns, PADDING)


def _is_target(rows_Bn: jax.Array, first: Any, size: int) -> jax.Array:
    """Which logit of a block is the target's, whose row in this device's part of the table is given."""
    return (jnp.arange(size) + first)[None, None, :] == rows_Bn[:, :, None]


def _target_logit(logits_Bns: jax.Array, rows_Bn: jax.Array, first: Any, *, gather: bool) -> jax.Array:
    """The target's logit if it is in the block, else 0."""
    size = logits_Bns.shape[-1]
    if not gather:  # compared: on TPU that fuses with the reductions
        return jnp.sum(jnp.where(_is_target(rows_Bn, first, size), logits_Bns, 0.0), axis=-1)
    local = rows_Bn - first
    logit_Bn = jnp.take_along_axis(logits_Bns, jnp.clip(local, 0, size - 1)[..., None], axis=-1)[..., 0]
    return jnp.where((local >= 0) & (local < size), logit_Bn, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_logps(
    hidden_BND: jax.Array, targets_BN: jax.Array, table_VD: jax.Array, options: LogpOptions, spread: Spread, vocab: int
) -> TokenValues:
    return _forward(hidden_BND, targets_BN, table_VD, options, spread, vocab)[0]


def _split(rows: int, N: int, chunk_tokens: int, blocks: int) -> tuple[int, int]:
    """As `division`, so that the logits of all tokens for a device's whole part are never held."""
    return division(rows, N, chunk_tokens * blocks, 2 if blocks == 1 else 1)


def _forward(
    hidden_BND: jax.Array, targets_BN: jax.Array, table_VD: jax.Array, options: LogpOptions, spread: Spread, vocab: int
) -> tuple[TokenValues, Any]:
    # Σ exp(a·(logit - largest)) is summed for these a, the largest being that of what has been seen; then
    # Σ exp(logit - largest)·(logit - largest), of which entropies are made.
    powers = (1, 2) if options.log_sum_sq else (1,)

    def scaled(sums: list[jax.Array], before: jax.Array, largest: jax.Array) -> list[jax.Array]:
        """Sums below another largest logit."""
        lower = before - largest
        out = [s * jnp.exp(a * lower) for a, s in zip(powers, sums, strict=False)]
        if options.entropy:  # before anything is seen both sums are 0, and the largest logit is -inf
            below = jnp.where(jnp.isneginf(lower), 0.0, lower)
            out.append((sums[-1] + below * sums[0]) * jnp.exp(lower))
        return out

    def local(hidden_BND: jax.Array, targets_BN: jax.Array, table_vD: jax.Array):
        B, N, _ = hidden_BND.shape
        blocks = _blocks(table_vD, options.block)

        def body(_, chunk):
            hidden_BnD, targets_Bn = (spread.gather(x) for x in chunk)
            rows_Bn = targets_Bn - spread.offset(table_vD.shape[0])

            def add(carry, block):
                before, sums, target = carry
                first, table_sD = block
                real_s = _real(spread, len(table_vD), vocab, first, len(table_sD))
                logits = _logits(hidden_BnD, table_sD, options.softcap, real_s, options.temperature)
                largest = jnp.maximum(before, jnp.max(logits, axis=-1))
                lower = logits - largest[..., None]
                here = [jnp.sum(jnp.exp(a * lower), axis=-1) for a in powers]
                if options.entropy:
                    here.append(jnp.sum(jnp.exp(lower) * lower, axis=-1))
                sums = [s + x for s, x in zip(scaled(sums, before, largest), here, strict=True)]
                target += _target_logit(logits, rows_Bn, first, gather=options.block is not None)
                return (largest, sums, target), None

            zeros = jnp.zeros(rows_Bn.shape, jnp.float32)
            begin = [zeros] * (len(powers) + options.entropy)
            (largest, sums, target), _ = _through(blocks, (zeros - jnp.inf, begin, zeros), add)
            before, largest = largest, spread.vocab_max(largest)
            *sums, target = spread.vocab_sum([*scaled(sums, before, largest), target])
            log_sums = [jnp.log(s) + a * largest for a, s in zip(powers, sums, strict=False)]
            values = {"logps": target - log_sums[0], "log_sum": log_sums[0]}
            if options.log_sum_sq:
                values["squares"] = log_sums[1] - 2 * log_sums[0]
            if options.entropy:
                values["entropy"] = log_sums[0] - largest - sums[-1] / sums[0]
            return None, {name: spread.own_rows(x, B) for name, x in values.items()}

        chunks, n = _split(B, N, options.chunk_tokens, len(blocks[0]))
        values = jax.lax.scan(body, None, (chunks_of(hidden_BND, chunks, n), chunks_of(targets_BN, chunks, n)))[1]
        return {name: joined(x, N) for name, x in values.items()}

    rows = P(spread.rows or None)
    values = spread.on_mesh(local, (rows, rows, P(spread.vocab or None)), rows)(hidden_BND, targets_BN, table_VD)
    found = TokenValues(values["logps"], values.get("squares"), values.get("entropy"))
    return found, (hidden_BND, targets_BN, table_VD, values["log_sum"])


def _backward(
    options: LogpOptions, spread: Spread, vocab: int, kept: Any, grads: TokenValues
) -> tuple[jax.Array, None, jax.Array]:
    hidden_BND, targets_BN, table_VD, log_sum_BN = kept
    temperature = options.temperature

    def local(hidden_BND, targets_BN, table_vD, log_sum_BN, grad_BN):
        B, N, D = hidden_BND.shape
        part, dtype = table_vD.shape[0], table_vD.dtype
        blocks = _blocks(table_vD, options.block)
        flat = lambda x: x.reshape(-1, x.shape[-1])

        def of_chunk(chunk):
            """The gradient to the chunk's hidden states, and its part of the table's gradient by block."""
            hidden_BnD, targets_Bn, log_sum_Bn, grad_Bn = (spread.gather(x) for x in chunk)
            rows_Bn = targets_Bn - spread.offset(part)

            def add(back_BnD, block):
                first, table_sD = block
                real_s = _real(spread, part, vocab, first, len(table_sD))
                logits_Bns = _logits(hidden_BnD, table_sD, options.softcap, real_s, temperature)
                probs_Bns = jnp.exp(logits_Bns - log_sum_Bn[..., None])
                grad_Bns = (_is_target(rows_Bn, first, len(table_sD)) - probs_Bns) * grad_Bn[..., None]
                if options.softcap:
                    grad_Bns = grad_Bns * (1 - (logits_Bns * temperature / options.softcap) ** 2)
                    grad_Bns = grad_Bns if real_s is None else jnp.where(real_s, grad_Bns, 0.0)
                grad_Bns = grad_Bns.astype(dtype)
                back_BnD += jnp.einsum("Bnv,vD->BnD", grad_Bns, table_sD, preferred_element_type=jnp.float32)
                mine_sD = jnp.dot(flat(grad_Bns).T, flat(hidden_BnD), preferred_element_type=jnp.float32)
                return back_BnD, mine_sD

            back_BnD, mine = _through(blocks, jnp.zeros(hidden_BnD.shape, jnp.float32), add)
            # Summed over the vocabulary's parts in the dtype of activations, as the products of every layer are.
            return spread.scatter_sum(back_BnD.astype(hidden_BND.dtype)), mine

        def body(total, chunk):
            back, mine = of_chunk(chunk)
            return total + mine, back

        chunks, n = _split(B, N, options.chunk_tokens, len(blocks[0]))
        parts = tuple(chunks_of(x, chunks, n) for x in (hidden_BND, targets_BN, log_sum_BN, grad_BN))
        if chunks == 1:
            back, total = of_chunk([x[0] for x in parts])
            back = back[None]
        else:
            total, back = jax.lax.scan(body, jnp.zeros(blocks[1].shape, jnp.float32), parts)
        return joined(back, N), spread.copies_sum(total.reshape(part, D).astype(dtype))

    rows, parts = P(spread.rows or None), P(spread.vocab or None)
    # Padding of a chunk has a gradient of zero, whatever its logits are.
    back_BND, table_grad_VD = spread.on_mesh(local, (rows, rows, parts, rows, rows), (rows, parts))(
        hidden_BND, targets_BN, table_VD, log_sum_BN, grads.logps if temperature == 1 else grads.logps / temperature
    )
    return back_BND, None, table_grad_VD


_token_logps.defvjp(_forward, _backward)
