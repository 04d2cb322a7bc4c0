"""The name of a model's parameters in signatures."""

from typing import Any

Params = dict[str, Any]  # a nested dict of arrays: {"embedding": ..., "layers": {"attention": {"q": ...}}}
