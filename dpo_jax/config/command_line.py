"""The command line and the config: read, checked and compared before anything is loaded or compiled."""

import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from dpo_jax.disk import read_json, write_json
from dpo_jax.errors import UserError
from dpo_jax.model.lora import parse_targets
from dpo_jax.model.placement import ATTENTION
from dpo_jax.model.remat import REMAT_POLICIES
from dpo_jax.objective.losses import LOSSES
from dpo_jax.objective.objective import DIVERGENCES, needs_reference, parse_loss
from dpo_jax.training.optimizer import OPTIMIZERS, SCHEDULES

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line with a config: how it is used, what its help adds, and its flags beside --config."""

    usage: str
    about: str
    define: Callable[[flags.FlagValues], None]


def _train_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Directory of the run; the same command continues it.", flag_values=values)
    flags.DEFINE_bool("distributed", False, "One process of several: join the others first.", flag_values=values)


TRAIN = Command(
    "python -m dpo_jax.train --config=configs/hhh.py[:PRESET] --workdir=DIR [--config.KEY=VALUE ...] [--distributed]",
    "Every key, its unit and its default: configs/common.py.",
    _train_flags,
)


def parse(argv: Sequence[str]) -> tuple[ml_collections.ConfigDict, Path, bool]:
    """Read `--config=FILE.py[:PRESET] --workdir=DIR [--config.KEY=VALUE ...] [--distributed]`.

    Returns:
      The config, the workdir, and whether this is one process of several.

    Raises:
      UserError: anything wrong with it, in one line.
      SystemExit: 0 after `--help`.
    """
    config, values = read_flags(argv, TRAIN)
    if not values["workdir"]:
        raise UserError(f"--workdir is missing; usage: {TRAIN.usage}")
    return config, Path(check_workdir(values["workdir"])), values["distributed"]


def read_flags(argv: Sequence[str], command: Command) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    """The config, and the values of this command's other flags by name.

    Raises:
      UserError: anything wrong with the command line, in one line.
      SystemExit: 0 after `--help`.
    """
    usage = command.usage
    if any(a in ("--help", "-h", "--helpfull") for a in argv[1:]):
        print(f"usage: {usage}\n\n{command.about}")
        raise SystemExit(0)
    file = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if file is None:
        raise UserError(f"--config is missing; usage: {usage}")
    path = Path(file.split(":")[0])
    if not path.is_file():
        there = ", ".join(
            sorted(str(p) for p in path.parent.glob("*.py") if p.name not in ("__init__.py", "common.py"))
        )
        raise UserError(f"--config={file}: no such file; " + (f"there are {there}" if there else f"usage: {usage}"))
    # A config imports its neighbours as `configs.NAME`, wherever the command is run from.
    root = str(path.resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    values = flags.FlagValues()  # not absl's own registry, which holds the flags of every library that is imported
    config_flags.DEFINE_config_file("config", help_string="Config file, FILE.py or FILE.py:PRESET.", flag_values=values)
    command.define(values)
    # config_flags finds overrides such as --config.seed in sys.argv, whatever it is given to parse.
    before, sys.argv = sys.argv, list(argv)
    try:
        rest = values(list(argv))
        config = values["config"].value
    except (flags.Error, ValueError) as e:
        raise UserError(" ".join(str(e).split())) from None
    except Exception as e:  # a config file is the user's own code: whatever is wrong in it is named in one line
        named = re.search(r"'(\w+)", str(e))
        if isinstance(e, AttributeError) and named and any(a.startswith(f"--config.{named[1]}") for a in argv):
            raise UserError(_unknown_key(named[1])) from None  # config_flags' word for it
        raise UserError(f"--config={file}: {type(e).__name__}: {' '.join(str(e).split())}") from None
    finally:
        sys.argv = before
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; usage: {usage}")
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config={file} cannot be read: get_config() must return a ConfigDict")
    return config, {name: values[name].value for name in values if name.split(".")[0] != "config"}


def _unknown_key(key: str) -> str:
    from configs.common import get_config

    known = sorted(get_config())
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"config key {key!r} does not exist; {hint}keys: {', '.join(known)}"


# What a key's value must be, and the words for it.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "batch_size": (lambda v: v >= 1, "at least 1"),
    "microbatches": (lambda v: v >= 1, "at least 1"),
    "max_prompt_length": (lambda v: v >= 1, "at least 1"),
    "max_completion_length": (lambda v: v >= 1, "at least 1"),
    "eval_pairs": (lambda v: v >= -1, "-1 (all), 0 (none) or a number of pairs"),
    "num_steps": (lambda v: v >= 0, "0 (by num_epochs) or more"),
    "num_epochs": (lambda v: v >= 0, "0 or more"),
    "sft_steps": (lambda v: v >= 0, "0 or more"),
    "learning_rate": (lambda v: v >= 0, "0 or more"),
    "sft_learning_rate": (lambda v: v >= 0, "0 or more"),
    "warmup_steps": (lambda v: v >= 0, "0 or more (below 1: a fraction of all updates)"),
    "weight_decay": (lambda v: v >= 0, "0 or more"),
    "max_grad_norm": (lambda v: v >= 0, "0 (off) or more"),
    "dpo_beta": (lambda v: v > 0, "above 0"),
    "label_smoothing": (lambda v: 0 <= v < 0.5, "in [0, 0.5)"),
    "ld_alpha": (lambda v: 0 <= v <= 1, "in [0, 1] (1: off)"),
    "simpo_gamma": (lambda v: v >= 0, "0 or more"),
    "cpo_alpha": (lambda v: v >= 0, "0 or more"),
    "discopop_tau": (lambda v: v > 0, "above 0"),
    "router_aux_loss_coef": (lambda v: v >= 0, "0 (off) or more"),
    "reference_sync_steps": (lambda v: v >= 0, "0 (never) or more"),
    "reference_sync_alpha": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "lora_rank": (lambda v: v >= 0, "0 (all parameters are trained) or more"),
    "lora_alpha": (lambda v: v > 0, "above 0"),
    "max_bad_steps": (lambda v: v >= 0, "0 (the first one ends the run) or more"),
    "stuck_after_seconds": (lambda v: v >= 0, "0 (never) or more seconds"),
    "log_every": (lambda v: v >= 1, "at least 1"),
    "eval_every": (lambda v: v >= 0, "0 (only first and last) or more"),
    "checkpoint_every": (lambda v: v >= 0, "0 (only the end) or more"),
    "keep_checkpoints": (lambda v: v >= 1, "at least 1"),
    "kl_prompts": (lambda v: v >= 0, "0 (no estimate) or more"),
    "sample_prompts": (lambda v: v >= 0, "0 or more"),
    "sample_tokens": (lambda v: v >= 1, "at least 1"),
    "sample_temperature": (lambda v: v >= 0, "0 (greedy) or more"),
    "sample_top_p": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "max_bad_fraction": (lambda v: 0 <= v <= 1, "in [0, 1]"),
}
_CHOICES: dict[str, Sequence[str]] = {
    "f_divergence": tuple(DIVERGENCES),
    "lr_schedule": SCHEDULES,
    "optimizer": OPTIMIZERS,
    "remat": tuple(REMAT_POLICIES),
    "attention": ATTENTION,
    "param_dtype": DTYPES,
    "compute_dtype": ("auto", *DTYPES),
    "lora_base_dtype": ("auto", *DTYPES),
    "overlong": ("truncate", "drop"),
    "prompt_format": ("auto", "chat", "plain"),
}


def check(config: Mapping[str, Any]) -> None:
    """Check keys and values against each other.

    Raises:
      UserError: the first thing that is wrong.
    """
    from configs.common import get_config

    known = get_config()
    for key in config:
        if key not in known:
            raise UserError(_unknown_key(key))
    missing = [key for key in known if key not in config]
    if missing:
        raise UserError(f"config keys are missing: {', '.join(missing)}; start from configs/common.py: get_config()")
    for key, default in known.items():
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(config[key], kinds) or isinstance(config[key], bool) != isinstance(default, bool):
            raise UserError(f"{key}={config[key]!r}: must be a {type(default).__name__}, such as {default!r}")
        if isinstance(config[key], float) and not math.isfinite(config[key]):
            raise UserError(f"{key}={config[key]!r}: must be finite")
    for key, (is_good, words) in _CHECKS.items():
        if not is_good(config[key]):
            raise UserError(f"{key}={config[key]!r}: must be {words}")
    for key, choices in _CHOICES.items():
        if config[key] not in choices:
            raise UserError(f"{key}={config[key]!r} does not exist; choose from {', '.join(choices)}")
    _check_loss(config, known)
    _check_lora(config, known)
    _check_offload(config)
    parse_options(config["compiler_options"])
    if not config["model"]:
        raise UserError("model is empty; name a Hugging Face id, a directory, or tiny")
    if not config["num_steps"] and not config["num_epochs"]:
        raise UserError("num_steps and num_epochs are both 0; set one of them")


# Keys that only some losses read: those that name them among their hyperparameters.
_OF_SOME_LOSSES = ("label_smoothing", "simpo_gamma", "cpo_alpha", "discopop_tau")


def _check_loss(c: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse combinations that mean nothing, as TRL does, and settings that nothing would read."""
    loss = f"loss={c['loss']}"
    parts = {name: LOSSES[name] for name in parse_loss(c["loss"])}
    for key in _OF_SOME_LOSSES:
        readers = [name for name, it in LOSSES.items() if key in it.hyperparameters]
        if c[key] != defaults[key] and not set(readers) & set(parts):
            raise UserError(f"{key} has no meaning for {loss}; leave it at {defaults[key]} or use {', '.join(readers)}")
    for key, owner, used in (
        ("f_alpha", "f_divergence=alpha", c["f_divergence"] == "alpha"),
        ("reference_sync_alpha", "reference_sync_steps above 0", c["reference_sync_steps"] > 0),
    ):
        if c[key] != defaults[key] and not used:
            raise UserError(f"{key}={c[key]:g} has no meaning without {owner}; leave it at {defaults[key]}")
    if "exo_pair" in parts and not c["label_smoothing"]:
        raise UserError("loss=exo_pair needs a label_smoothing above 0; its paper uses 0.001")
    allowed = [name for name, it in LOSSES.items() if it.divergence]
    if c["f_divergence"] != "reverse_kl" and not set(parts) <= set(allowed):
        raise UserError(f"f_divergence={c['f_divergence']} is not defined for {loss}; use {', '.join(allowed)}")
    sorting = [name for name, it in parts.items() if it.across]
    if c["wpo"] and sorting:
        raise UserError(
            f"wpo=True is not defined for {loss}: {sorting[0]} matches pairs with each other; set wpo=False"
        )
    free = [name for name, it in parts.items() if it.reference is False]
    for key, on in (("wpo", c["wpo"]), ("ld_alpha", c["ld_alpha"] != 1)):
        if on and free:
            raise UserError(f"{key}={c[key]} is not defined for {free[0]}; leave it at {defaults[key]}")
    if c["reference_cache"] and c["reference_sync_steps"]:
        raise UserError(
            f"reference_cache=True keeps a reference as it is, and reference_sync_steps={c['reference_sync_steps']} "
            "moves it; leave one of them out"
        )
    for key in ("reference", "reference_cache", "reference_sync_steps"):
        if c[key] and not needs_reference(parts):
            raise UserError(f"{key}={c[key]!r}: {loss} has no reference; leave it at {defaults[key]!r}")


def _check_lora(c: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    parse_targets(c["lora_targets"])
    for key in ("lora_alpha", "lora_rslora", "lora_targets", "lora_base_dtype"):
        if c[key] != defaults[key] and not c["lora_rank"]:
            raise UserError(f"{key}={c[key]} has no meaning without lora_rank above 0; leave it at {defaults[key]}")
    if c["lora_rank"] and c["reference_sync_steps"]:
        raise UserError(
            "reference_sync_steps moves a reference of its own, and with lora_rank above 0 the frozen base is the "
            "reference; set one of them to 0"
        )


def _check_offload(c: Mapping[str, Any]) -> None:
    for key, why in (
        ("reference_sync_steps", "moves the reference on the device"),
        ("reference_cache", "has no reference in memory at all"),
        ("lora_rank", "has the frozen base as its reference, on the device"),
    ):
        if c["reference_offload"] and c[key]:
            raise UserError(f"reference_offload=True: {key}={c[key]} {why}; set one of them to its default")
    if c["reference_offload"] and not needs_reference({name: LOSSES[name] for name in parse_loss(c["loss"])}):
        raise UserError(f"reference_offload=True: loss={c['loss']} has no reference; set it to False")


def parse_options(text: str) -> dict[str, str]:
    """`NAME=VALUE,NAME=VALUE` → compiler options.

    Raises:
      UserError: it is not of this form.
    """
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if any(not (name and equals and value) for name, equals, value in pairs):
        raise UserError(f"compiler_options={text!r}: must be NAME=VALUE,NAME=VALUE, such as xla_tpu_...=true")
    return {name.strip().lstrip("-"): value.strip() for name, _, value in pairs}


def check_workdir(workdir: str) -> str:
    """Refuse a remote directory, which a `Path` would quietly make a local one."""
    if re.match(r"[A-Za-z][\w+.-]*:/", workdir):
        raise UserError(f"workdir={workdir}: remote directories are not supported yet; give a local or a mounted one")
    return workdir


def claim_workdir(workdir: Path, config: Mapping[str, Any], write: bool) -> None:
    """Compare `workdir` with this config, or (`write`) make it this config's by its config.json.

    Raises:
      UserError: the directory belongs to another config, or cannot be written.
    """
    path = workdir / "config.json"
    mine = dict(config)
    if path.exists():
        theirs = read_json(path, "delete it to start the run anew")
        changed = [k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
        if changed:
            difference = ", ".join(f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} asked" for k in changed)
            raise UserError(
                f"{workdir} holds a run of another config ({difference}); use another --workdir or its config"
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not write:
            return
        write_json(path, mine, sort_keys=True)
    except OSError as e:
        raise UserError(f"workdir {workdir} cannot be written ({e.strerror}); choose another --workdir") from None
