"""What is asked of answers: every value that means nothing is refused by its name."""

import pytest

from dpo_jax.errors import UserError
from dpo_jax.sampling.params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 1.5), ("n", True), ("max_tokens", 0), ("temperature", -1), ("temperature", float("nan")),
        ("top_p", 0), ("top_p", 1.1), ("top_k", -1), ("min_p", 2), ("min_tokens", 129), ("seed", -1), ("seed", 2**32),
        ("stop", ("",)), ("stop", "x"), ("stop_token_ids", (-1,)), ("stop_token_ids", 3), ("round", 0.5),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(field, value):
    with pytest.raises(UserError, match=f"^{field}="):
        SamplingParams(**{field: value})


def test_lists_are_taken():
    asked = SamplingParams(stop=["a"], stop_token_ids=[1, 2])
    assert (asked.stop, asked.stop_token_ids) == (("a",), (1, 2))
