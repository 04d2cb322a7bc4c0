"""The one table of config keys: defaults, legal values, what each means and why a value is refused.

Checks, `--help`, `configs/common.py` and `docs/configuration.md` are made from it. A new key is a line here.
"""

import dataclasses
import math
import textwrap
from collections.abc import Callable
from typing import Any

from dpo_jax.config.values import parse_options, parse_targets
from dpo_jax.errors import UserError
from dpo_jax.objective.table import parse_loss

Value = bool | int | float | str


@dataclasses.dataclass(frozen=True)
class Legal:
    """The values that a key may have.

    Attributes:
      words: what a value must be, with the reason in brackets where it is not plain.
      holds: whether a value is one; it may raise a UserError that says more than `words` can.
    """

    words: str = ""
    holds: Callable[[Any], bool] = lambda value: True


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a config.

    Attributes:
      name: on the command line `--config.NAME`.
      default: its value if nothing else is asked for; its type is the key's.
      meaning: what it is, with its unit.
      legal: the values that it may have; a tuple of texts is a choice of these.
    """

    name: str
    default: Value
    meaning: str
    legal: Legal | tuple[str, ...] = Legal()

    @property
    def values(self) -> str:
        """The legal values in words."""
        if isinstance(self.legal, tuple):
            return ", ".join(self.legal)
        return self.legal.words or {bool: "True, False", int: "whole number", float: "number", str: "text"}[self.type]

    @property
    def type(self) -> type:
        return type(self.default)

    def check(self, value: Any) -> None:
        """Refuse a value of another type or one that is not legal.

        Raises:
          UserError: with what it must be.
        """
        given = f"{self.name}={value!r}"
        kinds = (int, float) if self.type is float else self.type
        if not isinstance(value, kinds) or isinstance(value, bool) != (self.type is bool):
            an = "an" if self.type is int else "a"
            raise UserError(f"{given}: must be {an} {self.type.__name__}, such as {self.default!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{given}: must be finite")
        if isinstance(self.legal, tuple):
            if value not in self.legal:
                raise UserError(f"{given} does not exist; choose from {', '.join(self.legal)}")
        elif not self.legal.holds(value):
            raise UserError(f"{given}: must be {self.legal.words}")


AT_LEAST_1 = Legal("at least 1", lambda v: v >= 1)
ABOVE_0 = Legal("above 0", lambda v: v > 0)
FRACTION = Legal("in [0, 1]", lambda v: 0 <= v <= 1)
POSITIVE_FRACTION = Legal("in (0, 1]", lambda v: 0 < v <= 1)
DEVICES = Legal("-1 (all that are left) or at least 1", lambda v: v == -1 or v >= 1)
DTYPES = ("float32", "bfloat16")


def from_0(zero: str = "", after: str = "") -> Legal:
    """0 or more, with what 0 means."""
    return Legal(f"0{zero and f' ({zero})'} or more{after}", lambda v: v >= 0)


def read_by(parse: Callable[[str], Any], words: str) -> Legal:
    """Texts that `parse` takes; it raises a UserError for others."""
    return Legal(words, lambda text: parse(text) is not None)


def _named(model: str) -> str:
    if not model:
        raise UserError("model is empty; name a Hugging Face id, a directory, or tiny")
    return model


SECTIONS: dict[str, tuple[Key, ...]] = {
    "what is trained": (
        Key("seed", 0, "seed of every random choice: data order, hold-out, fresh parameters, sampling", from_0()),
        Key("model", "",
            "a Hugging Face id, a local directory in that layout, or tiny (made from scratch, no download)",
            read_by(_named, "not empty")),
        Key("reference", "", "the reference model, an id or a directory; empty = the policy as it is when DPO starts"),
    ),
    "data": (
        Key("dataset", "hhh",
            "hhh, helpsteer3, ultrafeedback, synthetic, a path or glob, hf:OWNER/NAME, my_module:my_function, or a "
            "mixture of these by proportions: hhh:0.7,ultrafeedback:0.3"),
        Key("dataset_path", "",
            "where the dataset's raw files are (of a mixture: PATH,PATH); empty = download from the hub"),
        Key("split", "", "the split of an hf: dataset to train on; empty = told by its file names"),
        Key("eval_path", "", "a file of held-out pairs; empty = the published test split, else a seeded hold-out"),
        Key("eval_pairs", 512, "number of held-out pairs; 0 = no evaluation, -1 = the whole published split",
            Legal("-1 (all), 0 (none) or a number of pairs", lambda v: v >= -1)),
        Key("shuffle", True, "a new order every epoch, with evenly filled batches; False = the order of the file"),
        Key("drop_remainder", True, "leave out the last, short batch of an epoch"),
        Key("drop_ties", True, "drop pairs whose scores are equal"),
        Key("max_bad_fraction", 0.1, "stop before training if more than this fraction of the rows is malformed",
            FRACTION),
        Key("prompt_format", "auto",
            r"chat = the tokenizer's template, plain = \n\nHuman: ..., auto = chat if there is a template",
            ("auto", "chat", "plain")),
        Key("max_prompt_length", 512, "in tokens; a longer prompt loses its beginning", AT_LEAST_1),
        Key("max_completion_length", 512, "in tokens; a longer completion loses its end", AT_LEAST_1),
        Key("overlong", "truncate", "what is done with a pair that is too long: truncate it, or drop it",
            ("truncate", "drop")),
        Key("cache_dir", "",
            "where tokenised pairs are kept: a directory or gs://bucket/dir; empty = $DPO_JAX_CACHE or "
            "~/.cache/dpo_jax"),
    ),
    "batch and length of the run": (
        Key("batch_size", 64, "pairs in a step, exactly", AT_LEAST_1),
        Key("microbatches", 1, "parts of a batch that are computed one after the other, to save memory", AT_LEAST_1),
        Key("num_steps", 0, "updates of DPO; 0 = as many as num_epochs takes", from_0("by num_epochs")),
        Key("num_epochs", 1.0, "passes over the training pairs", from_0()),
        Key("sft_steps", 0, "updates of light SFT on chosen completions before DPO", from_0()),
        Key("sft_learning_rate", 1e-5, "learning rate of SFT, constant after the warm-up", from_0()),
    ),
    "objective and optimiser": (
        Key("dpo_beta", 0.1, "start at 0.1; a higher beta keeps the policy closer to the reference", ABOVE_0),
        Key("loss", "sigmoid", "one of docs/losses.md, or a weighted sum of several: sigmoid:1.0,sft:0.2",
            read_by(parse_loss, "NAME or NAME:WEIGHT,NAME:WEIGHT")),
        Key("label_smoothing", 0.0, "probability that a label is flipped (for exo_pair: 1e-3)",
            Legal("in [0, 0.5)", lambda v: 0 <= v < 0.5)),
        Key("f_divergence", "reverse_kl", "how the distance from the reference is measured",
            ("reverse_kl", "forward_kl", "js", "alpha")),
        Key("f_alpha", 0.5, "coefficient of f_divergence=alpha: 1 = reverse_kl, 0 = forward_kl"),
        Key("wpo", False, "weight each pair by how likely the policy itself is to give its two completions"),
        Key("ld_alpha", 1.0, "weight of the tokens beyond the shorter completion's length; 1 = off",
            Legal("in [0, 1] (1: off)", FRACTION.holds)),
        Key("router_aux_loss_coef", 0.0, "weight of the load-balancing loss of a mixture of experts; 0 = off",
            from_0("off")),
        Key("simpo_gamma", 0.5, "target margin of loss=simpo", from_0()),
        Key("cpo_alpha", 1.0, "weight of the chosen completions' likelihood in loss=cpo", from_0()),
        Key("discopop_tau", 0.05, "temperature of the blend in loss=discopop", ABOVE_0),
        Key("reference_cache", False,
            "compute the reference's log-probabilities once, keep them on disk and free its memory; False = in every "
            "step"),
        Key("reference_sync_steps", 0,
            "updates between two moves of the reference towards the policy; 0 = it never moves",
            from_0("never")),
        Key("reference_sync_alpha", 0.6, "how far the reference moves each time; 1 = all the way", POSITIVE_FRACTION),
        Key("learning_rate", 1e-6,
            "peak of DPO's learning rate; 5e-7 to 1e-5, lower than SFT's (adapters: 1e-5 and more)",
            from_0()),
        Key("lr_schedule", "linear", "the learning rate after the warm-up: constant, or linear or cosine decay to 0",
            ("constant", "linear", "cosine")),
        Key("warmup_steps", 0.1,
            "updates in which the learning rate rises to its peak; below 1 = a fraction of all updates",
            from_0(after=" (below 1: a fraction of all updates)")),
        Key("optimizer", "adamw", "the optimiser", ("adamw", "rmsprop")),
        Key("weight_decay", 0.0, "decoupled weight decay; norms do not decay", from_0()),
        Key("max_grad_norm", 1.0, "gradients are clipped to this global norm; 0 = off", from_0("off")),
    ),
    "adapters (docs/lora.md); the base under them is frozen and is the reference": (
        Key("lora_rank", 0,
            "rank of the adapters, 8 to 64, with a learning_rate from 1e-5; 0 = all parameters are trained",
            from_0("all parameters are trained")),
        Key("lora_alpha", 32.0, "adapters are scaled by lora_alpha / lora_rank", ABOVE_0),
        Key("lora_rslora", False, "divide lora_alpha by the square root of the rank, for large ranks"),
        Key("lora_targets", "all",
            "projections with an adapter: all, or some of q,k,v,o,gate,up,down (also q_proj, ...)",
            read_by(parse_targets, "all, or names with commas between")),
        Key("lora_base_dtype", "auto", "number format of the frozen base; auto = compute_dtype", ("auto", *DTYPES)),
    ),
    "numbers and machine": (
        Key("param_dtype", "float32",
            "number format of the trained parameters; bfloat16 is rounded stochastically, and the optimiser's "
            "moments stay float32",
            DTYPES),
        Key("compute_dtype", "auto",
            "number format of activations, products and the reference; auto = bfloat16, on CPU float32",
            ("auto", *DTYPES)),
        Key("remat", "dots",
            "what the backward pass computes again: none, dots (element-wise work), attention (all but q, k, v and "
            "attention's output), attention_offload (the same, with those in the host's memory), full",
            ("none", "dots", "attention", "attention_offload", "full")),
        Key("attention", "auto",
            "how attention is computed, with the same numbers: splash (a TPU kernel), tiles (skips most keys of "
            "other pairs, for CPU), dense (XLA blocks, for GPU); auto = by the machine",
            ("auto", "splash", "tiles", "dense")),
        Key("optimizer_offload", False, "keep the optimiser's moments in the host's memory between updates"),
        Key("reference_offload", False,
            "keep the reference in the host's memory and copy one layer at a time to the devices"),
        Key("mesh_data", 1, "devices over which rows are sharded and parameters are whole; -1 = all that are left",
            DEVICES),
        Key("mesh_fsdp", -1, "devices over which rows and parameters are sharded; -1 = all that are left", DEVICES),
        Key("mesh_tensor", 1, "devices over which heads, ffn and vocabulary are sharded; -1 = all that are left",
            DEVICES),
        Key("compiler_options", "", "XLA options of the steps, added to those of the TPU generation",
            read_by(parse_options, "NAME=VALUE,NAME=VALUE")),
        Key("compilation_cache", "",
            "where compiled programs are kept: a directory, or off; empty = beside the cache of tokenised pairs"),
    ),
    "faults (docs/faults.md)": (
        Key("max_bad_steps", 5,
            "updates in a row that may be skipped because loss or gradient are not finite; one more ends the run",
            from_0("the first one ends the run")),
        Key("stuck_after_seconds", 600.0,
            "seconds without progress after which the process prints its threads' stacks and ends; 0 = never",
            from_0("never", " seconds")),
    ),
    "what is written": (
        Key("log_every", 10, "updates between train records (the first update is always recorded)", AT_LEAST_1),
        Key("eval_every", 100, "updates between evaluations, besides those at the start and the end; 0 = only those",
            from_0("only first and last")),
        Key("checkpoint_every", 200, "updates between checkpoints, besides the one at the end; 0 = only that one",
            from_0("only the end")),
        Key("keep_checkpoints", 2, "number of newest checkpoints that are kept", AT_LEAST_1),
        Key("export", True, "write export/: a Hugging Face directory of the aligned policy"),
        Key("kl_prompts", 8,
            "held-out prompts that are answered twice at every evaluation, to estimate the KL divergence from the "
            "reference; 0 = no estimate",
            from_0("no estimate")),
        Key("sample_prompts", 4, "held-out prompts that are answered before and after training; 0 = none", from_0()),
        Key("sample_tokens", 64, "maximum length of an answer in tokens", AT_LEAST_1),
        Key("sample_temperature", 0.8, "temperature of the sampled answers, which are shown beside the greedy ones",
            from_0("greedy")),
        Key("sample_top_p", 0.95, "nucleus mass of the sampled answers", POSITIVE_FRACTION),
        Key("wandb_project", "", "Weights & Biases project for a copy of the records (pip install wandb); empty = off"),
        Key("trackio_project", "", "trackio project for a copy of the records (pip install trackio); empty = off"),
    ),
}  # fmt: skip
KEYS: dict[str, Key] = {key.name: key for keys in SECTIONS.values() for key in keys}


def describe() -> str:
    """Every key with its default and its meaning, for `--help`."""
    lines = ["Keys of the config, --config.KEY=VALUE:"]
    for title, keys in SECTIONS.items():
        lines.append(f"\n{title}")
        for key in keys:
            lines += textwrap.wrap(
                f"{key.name}={key.default}: {key.meaning}", 118, initial_indent="  ", subsequent_indent="      "
            )
    return "\n".join(lines)
