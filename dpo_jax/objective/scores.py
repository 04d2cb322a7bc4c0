"""Hidden states → the scores of completions: one number each, by a reward model's head.

transformers' sequence classifiers read the score at the last token whose id is not `pad_token_id`, wherever padding
begins. Where the end of a turn is the padding too, that is the token before it, and so it is here: the score of a model
is then the same in both (transformers issue 35352 has the story).

Shapes: B rows, T tokens of a row, K groups in a row, n completions of a group, D model.
"""

import jax
import jax.numpy as jnp

from dpo_jax.objective.logps import Logps, in_group_order
from dpo_jax.rows.batch import Batch
from dpo_jax.rows.shape import RowShape


def group_scores(
    hidden_BTD: jax.Array, batch: Batch[jax.Array], head_1D: jax.Array, shape: RowShape, pad: int | None
) -> Logps:
    """Scores of the completions of every group in a row, float32 `[B, K, n]`, in the place of log-probabilities.

    Args:
      hidden_BTD, head_1D: final hidden states of the rows of one microbatch, and the head.
      pad: the token that no score is read at, see `last_tokens`; None: there is none.

    Returns:
      The scores of group k in its own order; 0 where a row has no group k.
    """
    columns_BKn = last_tokens(batch, shape, pad)
    B, K, n = columns_BKn.shape
    hidden_BCD = jnp.take_along_axis(hidden_BTD, columns_BKn.reshape(B, K * n, 1), axis=1)
    # A sum of products, no matrix product: a TPU's would round the numbers.
    scores_BC = jnp.sum(hidden_BCD.astype(jnp.float32) * head_1D.astype(jnp.float32)[None], axis=-1)
    scores_BKn = in_group_order(scores_BC.reshape(B, K, n), batch)
    return Logps(jnp.where(batch.is_group[:, :, None], scores_BKn, 0.0))


def last_tokens(batch: Batch[jax.Array], shape: RowShape, pad: int | None) -> jax.Array:
    """The column of the last token of each group's prompt with one completion whose id is not `pad`.

    int32 `[B, K, n]`, by slot; 0 where a row has no group k.
    """
    K = batch.is_group.shape[-1]
    counts_BT = (batch.segments > 0) if pad is None else (batch.segments > 0) & (batch.tokens != pad)
    numbers_11K = jnp.arange(1, K + 1)[None, None, :]

    def last(start: int, width: int) -> jax.Array:
        """The last such column within a slot, -1 where there is none, `[B, K]`."""
        part = slice(start, start + width)
        mine_BWK = (batch.segments[:, part, None] == numbers_11K) & counts_BT[:, part, None]
        column_1W1 = jnp.arange(start, start + width)[None, :, None]
        return jnp.max(jnp.where(mine_BWK, column_1W1, -1), axis=1, initial=-1)

    prompt_BK, *slots_BK = (last(*slot) for slot in zip(shape.starts, shape.widths, strict=True))
    # All of a completion may be padding by its ids: then the prompt's last token counts, as it does in transformers.
    columns = [jnp.where(slot_BK >= 0, slot_BK, prompt_BK) for slot_BK in slots_BK]
    return jnp.maximum(jnp.stack(columns, axis=-1), 0)
