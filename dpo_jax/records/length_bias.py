"""Whether a policy wins held-out pairs by length alone: its values by how much the two completions differ in length.

A data set whose chosen answers are the longer ones teaches length, and an accuracy over all pairs does not show it
(Singhal et al. 2023, arXiv 2310.03716). Wins where the chosen answer is the shorter one do.
"""

import numpy as np

RATIO = 1.25  # of two completions' tokens: further apart than this, one is the longer one
GROUPS = ("chosen_shorter", "similar_length", "chosen_longer")


def length_groups(lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Pairs by the lengths of their completions, all of `GROUPS`.

    Args:
      lengths: int `[n, 3]`, tokens of prompt, chosen, rejected.

    Returns:
      bool `[n]` by name; every pair is in exactly one: `chosen_shorter` where rejected > RATIO·chosen, `chosen_longer`
      where chosen > RATIO·rejected, else `similar_length`.

    >>> {name: members.tolist() for name, members in length_groups(np.array([[9, 10, 12], [9, 20, 10]])).items()}
    {'chosen_shorter': [False, False], 'similar_length': [True, False], 'chosen_longer': [False, True]}
    """
    chosen, rejected = lengths[:, 1], lengths[:, 2]
    shorter, longer = rejected > RATIO * chosen, chosen > RATIO * rejected
    return dict(zip(GROUPS, (shorter, ~shorter & ~longer, longer), strict=True))


def length_correlation(lengths: np.ndarray, margin: np.ndarray) -> float | None:
    """Pearson's correlation, over pairs, of (chosen − rejected tokens) with the reward margin.

    Near 0 the margins do not depend on length; near 1 the policy has learned to prefer what is longer. None where
    either does not vary: then there is none. `lengths` is as in `length_groups`, `margin` float `[n]`.
    """
    difference = lengths[:, 1].astype(np.float64) - lengths[:, 2]
    if len(margin) < 2 or not difference.std() or not margin.std():
        return None
    return float(np.corrcoef(difference, margin)[0, 1])
