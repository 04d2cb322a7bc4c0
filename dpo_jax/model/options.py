"""How a model is to be placed and computed, in plain values: what a person asks for, before any device is known."""

import dataclasses
import math
from collections.abc import Mapping

ATTENTION = ("auto", "splash", "tiles", "dense")


@dataclasses.dataclass(frozen=True)
class LayoutOptions:
    """What `placement.place_model` is asked for; dtypes by name.

    Attributes:
      param_dtype: of what is trained.
      compute_dtype: of activations, products and the reference; auto is bfloat16, and float32 on CPU, which is faster
        there.
      base_dtype: of the frozen base under adapters; auto is the compute dtype.
      attention: one of `ATTENTION`.
      optimizer_offload, reference_offload: keep the optimiser's moments, or the reference, in the host's memory.
      compiler_options: XLA's, on top of those of the TPU generation.
      longest: no sequence of a prompt and a completion has more tokens; None: unknown.
    """

    param_dtype: str = "float32"
    compute_dtype: str = "auto"
    base_dtype: str = "auto"
    attention: str = "auto"
    optimizer_offload: bool = False
    reference_offload: bool = False
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    longest: int | None = None


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a model.

    Attributes:
      rank: r, at least 1.
      alpha: the numerator of the scale.
      targets: projections that have an adapter, such as ("q", "v"); ("all",) before it is known which there are.
      rslora: divide alpha by √r, not by r (Kalajdzievski 2023, arXiv 2312.03732).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False

    @property
    def scale(self) -> float:
        """What A·B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
