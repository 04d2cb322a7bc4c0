"""What a plan of sampling is asked for, before anything that takes seconds is imported."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.sampling.params import SamplingParams

CACHES = ("", "int8")
PARAMETERS = ("export", "training")


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """Answers to draw.

    Attributes:
      rows: answers that all devices decode at once; 0 is what the sampler takes.
      prompt: tokens of a prompt.
      asked: n answers to a prompt, of `max_tokens` each.
      cache_dtype: "int8", or empty for the compute dtype.
      parameters: "export": the exported model, in the compute dtype; "training": as a run that trains has them, in
        `param_dtype`, adapters beside their base.
    """

    rows: int
    prompt: int
    asked: SamplingParams
    cache_dtype: str = ""
    parameters: str = "export"


def read_request(values: Mapping[str, Any]) -> SampleRequest:
    """The request of the command line's values.

    Raises:
      UserError: one of them means nothing; it is named.
    """
    if values["sample_n"] < 1:
        raise UserError(f"--sample_n={values['sample_n']}; needs at least 1 answer")
    for name, least in (("sample_rows", 0), ("sample_prompt", 1), ("sample_tokens", 1)):
        if values[name] < least:
            raise UserError(f"--{name}={values[name]}; needs {least} or more")
    for name, known in (("cache_dtype", CACHES), ("sample_params", PARAMETERS)):
        if values[name] not in known:
            raise UserError(f"--{name}={values[name]}; needs {' or '.join(x or 'nothing' for x in known)}")
    asked = SamplingParams(n=values["sample_n"], max_tokens=values["sample_tokens"])
    return SampleRequest(
        values["sample_rows"], values["sample_prompt"], asked, values["cache_dtype"], values["sample_params"]
    )
