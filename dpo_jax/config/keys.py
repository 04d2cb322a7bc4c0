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
        Key("seed", 0, "of every random choice: data order, hold-out, fresh parameters, sampling", from_0()),
        Key("model", "",
            'Hugging Face id, a local directory in that layout, or "tiny" (made from scratch, no download)',
            read_by(_named, "not empty")),
        Key("reference", "", "empty = the policy as it is when DPO starts; else an id or a directory"),
    ),
    "data": (
        Key("dataset", "hhh", "hhh, helpsteer3, ultrafeedback, synthetic, a path or glob, hf:OWNER/NAME, "
            "my_module:my_function, or a mixture of these, by proportions: hhh:0.7,ultrafeedback:0.3"),
        Key("dataset_path", "", "where its raw files are (of a mixture: PATH,PATH); empty = download from the hub"),
        Key("split", "", "of an hf: dataset, to train on; empty = told by its file names"),
        Key("eval_path", "", "a file of held-out pairs; empty = the published test split, else a seeded hold-out"),
        Key("eval_pairs", 512, "held-out pairs; 0 = no evaluation, -1 = the whole published split",
            Legal("-1 (all), 0 (none) or a number of pairs", lambda v: v >= -1)),
        Key("shuffle", True, "a new order every epoch with evenly filled batches; False = file order"),
        Key("drop_remainder", True, "leave out the last, short batch of an epoch"),
        Key("drop_ties", True, "drop pairs whose scores are equal"),
        Key("max_bad_fraction", 0.1, "stop before training if more of the rows are malformed", FRACTION),
        Key("prompt_format", "auto",
            r"chat (the tokenizer's template), plain (\n\nHuman: ...), auto = chat if there is one",
            ("auto", "chat", "plain")),
        Key("max_prompt_length", 512, "tokens; a longer prompt loses its beginning", AT_LEAST_1),
        Key("max_completion_length", 512, "tokens; a longer completion loses its end", AT_LEAST_1),
        Key("overlong", "truncate", "truncate, or drop the pair", ("truncate", "drop")),
        Key("cache_dir", "",
            "tokenised pairs: a directory or gs://bucket/dir; empty = $DPO_JAX_CACHE or ~/.cache/dpo_jax"),
    ),
    "batch and length of the run": (
        Key("batch_size", 64, "pairs a step, exactly", AT_LEAST_1),
        Key("microbatches", 1, "parts of a batch computed one after the other, to save memory", AT_LEAST_1),
        Key("num_steps", 0, "updates of DPO; 0 = num_epochs", from_0("by num_epochs")),
        Key("num_epochs", 1.0, "passes over the training pairs", from_0()),
        Key("sft_steps", 0, "updates of light SFT on chosen completions before DPO", from_0()),
        Key("sft_learning_rate", 1e-5, "constant after the warm-up", from_0()),
    ),
    "objective and optimiser": (
        Key("dpo_beta", 0.1, "start at 0.1; higher keeps the policy closer to the reference", ABOVE_0),
        Key("loss", "sigmoid", "one of docs/losses.md, or a weighted sum: sigmoid:1.0,sft:0.2",
            read_by(parse_loss, "NAME or NAME:WEIGHT,NAME:WEIGHT")),
        Key("label_smoothing", 0.0, "probability that a label is flipped, below 0.5 (exo_pair: 1e-3)",
            Legal("in [0, 0.5)", lambda v: 0 <= v < 0.5)),
        Key("f_divergence", "reverse_kl", "from the reference: reverse_kl, forward_kl, js, alpha",
            ("reverse_kl", "forward_kl", "js", "alpha")),
        Key("f_alpha", 0.5, "of f_divergence=alpha: 1 = reverse_kl, 0 = forward_kl"),
        Key("wpo", False, "weight pairs by how likely the policy itself would have answered so"),
        Key("ld_alpha", 1.0, "weight of tokens beyond the shorter completion's length, in [0, 1]; 1 = off",
            Legal("in [0, 1] (1: off)", FRACTION.holds)),
        Key("router_aux_loss_coef", 0.0, "weight of the load-balancing loss of a mixture of experts; 0 = off",
            from_0("off")),
        Key("simpo_gamma", 0.5, "of loss=simpo: the margin asked for", from_0()),
        Key("cpo_alpha", 1.0, "of loss=cpo: weight of the likelihood of chosen completions", from_0()),
        Key("discopop_tau", 0.05, "of loss=discopop: temperature of the blend", ABOVE_0),
        Key("reference_cache", False,
            "compute the reference once, keep it on disk, and free its memory; False = in every step"),
        Key("reference_sync_steps", 0, "updates after which the reference moves towards the policy; 0 = never",
            from_0("never")),
        Key("reference_sync_alpha", 0.6, "how far it moves: 1 = all the way", POSITIVE_FRACTION),
        Key("learning_rate", 1e-6, "peak; 5e-7 to 1e-5, lower than SFT's; of adapters 1e-5 and more", from_0()),
        Key("lr_schedule", "linear", "constant, linear or cosine to 0 after the warm-up",
            ("constant", "linear", "cosine")),
        Key("warmup_steps", 0.1, "updates from 0 to the peak; below 1 = a fraction of all updates",
            from_0(after=" (below 1: a fraction of all updates)")),
        Key("optimizer", "adamw", "adamw or rmsprop", ("adamw", "rmsprop")),
        Key("weight_decay", 0.0, "decoupled; norms do not decay", from_0()),
        Key("max_grad_norm", 1.0, "clip by global norm; 0 = off", from_0("off")),
    ),
    "adapters (docs/lora.md): the base is frozen and, without them, the reference": (
        Key("lora_rank", 0, "0 = all parameters are trained; else 8 to 64, with a learning_rate from 1e-5",
            from_0("all parameters are trained")),
        Key("lora_alpha", 32.0, "adapters are scaled by lora_alpha / lora_rank", ABOVE_0),
        Key("lora_rslora", False, "divide lora_alpha by the root of the rank, for large ranks"),
        Key("lora_targets", "all", "all projections, or some of q,k,v,o,gate,up,down (also q_proj, ...)",
            read_by(parse_targets, "all, or names with commas between")),
        Key("lora_base_dtype", "auto", "of the frozen base; auto = compute_dtype", ("auto", *DTYPES)),
    ),
    "numbers and machine": (
        Key("param_dtype", "float32", "of the trained parameters; bfloat16 is rounded at random, moments stay float32",
            DTYPES),
        Key("compute_dtype", "auto", "of activations, products and the reference; auto = bfloat16, on CPU float32",
            ("auto", *DTYPES)),
        Key("remat", "dots", "what the backward pass computes again: none, dots (element-wise work), attention (all "
            "but q, k, v and attention's output), attention_offload (the same, kept in the host's memory meanwhile), "
            "full",
            ("none", "dots", "attention", "attention_offload", "full")),
        Key("attention", "auto", "auto = splash (kernel) on TPU, tiles (skips most of other pairs' keys) on CPU, dense "
            "(XLA blocks) on GPU; all give the same numbers", ("auto", "splash", "tiles", "dense")),
        Key("optimizer_offload", False, "keep the optimiser's moments in the host's memory between updates"),
        Key("reference_offload", False, "keep the reference in the host's memory, a layer at a time on the device"),
        Key("mesh_data", 1, "devices over which rows are sharded and parameters are whole; -1 = all that are left",
            DEVICES),
        Key("mesh_fsdp", -1, "devices over which rows and parameters are sharded", DEVICES),
        Key("mesh_tensor", 1, "devices over which heads, ffn and vocabulary are sharded", DEVICES),
        Key("compiler_options", "",
            "XLA's for the steps, NAME=VALUE,NAME=VALUE, on top of those of the TPU generation",
            read_by(parse_options, "NAME=VALUE,NAME=VALUE")),
        Key("compilation_cache", "",
            "compiled programs: a directory, off, or empty = beside the cache of tokenised pairs"),
    ),
    "faults (docs/faults.md)": (
        Key("max_bad_steps", 5,
            "updates in a row that are skipped, as loss or gradient are not finite; one more ends the run",
            from_0("the first one ends the run")),
        Key("stuck_after_seconds", 600.0,
            "without any progress, the process ends with the stacks of its threads; 0 = never",
            from_0("never", " seconds")),
    ),
    "what is written": (
        Key("log_every", 10, "updates between train records (the first is always written)", AT_LEAST_1),
        Key("eval_every", 100, "updates between evaluations; one comes first and last in any case; 0 = only those",
            from_0("only first and last")),
        Key("checkpoint_every", 200, "updates between checkpoints; the end is always saved; 0 = only the end",
            from_0("only the end")),
        Key("keep_checkpoints", 2, "newest ones kept", AT_LEAST_1),
        Key("export", True, "write export/: a Hugging Face directory of the aligned policy"),
        Key("kl_prompts", 8,
            "held-out prompts, answered twice at every evaluation: KL from the reference; 0 = no estimate",
            from_0("no estimate")),
        Key("sample_prompts", 4, "held-out prompts answered before and after; 0 = none", from_0()),
        Key("sample_tokens", 64, "most tokens of an answer", AT_LEAST_1),
        Key("sample_temperature", 0.8, "of the sampled answers, shown beside the greedy ones", from_0("greedy")),
        Key("sample_top_p", 0.95, "nucleus mass of the sampled answers", POSITIVE_FRACTION),
        Key("wandb_project", "", "Weights & Biases project for a copy of the records (pip install wandb); empty = off"),
        Key("trackio_project", "", "the same for trackio (pip install trackio)"),
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
