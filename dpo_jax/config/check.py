"""Refuse a config that cannot be run, before anything is loaded: each key by the table, then what does not go together.

Without JAX: a refusal takes no longer than reading the command line.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dpo_jax.config.judges import same_judges
from dpo_jax.config.keys import KEYS
from dpo_jax.config.rewards import weighted_names
from dpo_jax.errors import UserError
from dpo_jax.objective.table import LOSS_FACTS, needs_reference, parse_loss

Config = Mapping[str, Any]


def check(config: Config) -> None:
    """Check keys and values, alone and against each other; a UserError is of the first that is wrong."""
    for name in config:
        if name not in KEYS:
            raise unknown_key(name)
    if missing := [name for name in KEYS if name not in config]:
        raise UserError(f"config keys are missing: {', '.join(missing)}; start from dpo_jax.get_config()")
    for name, key in KEYS.items():
        key.check(config[name])
    for rule in RULES:
        rule(config)
    if not config["num_steps"] and not config["num_epochs"]:
        raise UserError("num_steps and num_epochs are both 0; set one of them")


def unknown_key(name: str) -> UserError:
    """The refusal of a key that is not in the table, with the nearest one that is."""
    hint = "".join(f"did you mean {near}? " for near in difflib.get_close_matches(name, KEYS, 1))
    return UserError(f"config key {name!r} does not exist; {hint}keys: {', '.join(sorted(KEYS))}")


def _asked(c: Config, names: Iterable[str]) -> list[str]:
    """Those of these keys that are not at their default."""
    return [name for name in names if c[name] != KEYS[name].default]


# Keys that nothing reads unless another key asks for it: the owner in words, whether it is there, its keys.
_OWNERS: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    ("f_divergence=alpha", lambda c: c["f_divergence"] == "alpha", "f_alpha"),
    ("judge", lambda c: bool(c["judge"]), "win_rate_prompts win_rate_baseline"),
    ("task=reward", lambda c: c["task"] in ("reward", "rlhf"), "reward_center reward_margin"),
    (
        "task=rlhf",
        lambda c: c["task"] == "rlhf",
        "reward_model reward_steps reward_learning_rate reward_batch_size",
    ),
    ("a reference", lambda c: bool(c["reference"]), "reference_revision"),
    ("reference_sync_steps above 0", lambda c: c["reference_sync_steps"] > 0, "reference_sync_alpha"),
    ("rounds above 0", lambda c: c["rounds"] > 0, "round_reference"),
    (
        "rounds above 0, sft_on=best_of_n or task=rl",
        lambda c: _collects(c) or c["task"] in ("rl", "rlhf"),
        "same_judge",
    ),
    (
        "rounds above 0 or sft_on=best_of_n",
        lambda c: _collects(c),
        "round_prompts collect_judge collect_n collect_temperature collect_mode collect_length_penalty "
        "collect_min_margin collect_unfinished",
    ),
    (
        "task=rl",
        lambda c: c["task"] in ("rl", "rlhf"),
        "rl_reward rl_n rl_loss rl_clip_low rl_clip_high rl_advantage rl_kl rl_kl_coef rl_temperature rl_top_p "
        "rl_correction rl_epochs rl_minibatches rl_unfinished rl_length_penalty rl_keep",
    ),
    ("lora_rank above 0", lambda c: c["lora_rank"] > 0, "lora_alpha lora_rslora lora_targets lora_base_dtype"),
)


def _check_owners(c: Config) -> None:
    for owner, is_there, names in _OWNERS:
        for name in [] if is_there(c) else _asked(c, names.split()):
            raise UserError(f"{name}={c[name]} has no meaning without {owner}; leave it at {KEYS[name].default}")


def _check_hyperparameters(c: Config) -> None:
    """Keys that only some losses read: those that name them among their hyperparameters."""
    for name in _asked(c, ("label_smoothing", "simpo_gamma", "cpo_alpha", "discopop_tau")):
        readers = [loss for loss, it in LOSS_FACTS.items() if name in it.hyperparameters]
        if not set(readers) & set(parse_loss(c["loss"])):
            mend = f"leave it at {KEYS[name].default} or use {', '.join(readers)}"
            raise UserError(f"{name} has no meaning for loss={c['loss']}; {mend}")


def _check_loss(c: Config) -> None:
    """Refuse combinations that mean nothing, as TRL does."""
    loss = f"loss={c['loss']}"
    parts = {name: LOSS_FACTS[name] for name in parse_loss(c["loss"])}
    if "exo_pair" in parts and not c["label_smoothing"]:
        raise UserError("loss=exo_pair needs a label_smoothing above 0; its paper uses 0.001")
    allowed = [name for name, it in LOSS_FACTS.items() if it.divergence]
    if c["f_divergence"] != "reverse_kl" and not set(parts) <= set(allowed):
        raise UserError(f"f_divergence={c['f_divergence']} is not defined for {loss}; use {', '.join(allowed)}")
    across = [name for name, it in parts.items() if it.across]
    if c["wpo"] and across:
        raise UserError(f"wpo=True is not defined for {loss}: {across[0]} matches pairs with each other; set wpo=False")
    free = [name for name, it in parts.items() if it.reference is False]
    for name in _asked(c, ("wpo", "ld_alpha")) if free else []:
        raise UserError(f"{name}={c[name]} is not defined for {free[0]}; leave it at {KEYS[name].default}")


def _check_reference(c: Config) -> None:
    names = ("reference", "reference_cache", "reference_sync_steps", "reference_offload")
    for name in [] if needs_reference(parse_loss(c["loss"])) else _asked(c, names):
        raise UserError(f"{name}={c[name]!r}: loss={c['loss']} has no reference; leave it at {KEYS[name].default!r}")
    if c["reference_cache"] and c["reference_sync_steps"]:
        raise UserError(
            f"reference_cache=True keeps a reference as it is, and reference_sync_steps={c['reference_sync_steps']} "
            "moves it; leave one of them out"
        )
    if c["lora_rank"] and c["reference_sync_steps"]:
        raise UserError(
            "reference_sync_steps moves a reference of its own, and with lora_rank above 0 the frozen base is the "
            "reference; set one of them to 0"
        )
    for name, why in (
        ("reference_sync_steps", "moves the reference on the device"),
        ("reference_cache", "has no reference in memory at all"),
        ("lora_rank", "has the frozen base as its reference, on the device"),
    ):
        if c["reference_offload"] and c[name]:
            raise UserError(f"reference_offload=True: {name}={c[name]} {why}; set one of them to its default")


# Keys that tasks other than DPO have no use for: those of a loss of pairs, of the reference, of SFT before, of judges.
_OF_PAIRS = "dpo_beta loss label_smoothing f_divergence f_alpha wpo ld_alpha simpo_gamma cpo_alpha discopop_tau rounds"
_OF_REFERENCES = "reference reference_revision reference_offload"
_OF_MOVING = "reference_cache reference_sync_steps reference_sync_alpha"
_OF_SFT = "sft_steps sft_learning_rate sft_lr_schedule"
_WITHOUT = {
    "dpo": "",
    "sft": f"{_OF_PAIRS} {_OF_REFERENCES} {_OF_MOVING} {_OF_SFT}",
    "rl": f"{_OF_PAIRS} {_OF_MOVING}",
    "rlhf": f"{_OF_PAIRS} {_OF_MOVING}",
    "reward": f"{_OF_PAIRS} {_OF_REFERENCES} {_OF_MOVING} {_OF_SFT} judge sft_on",
    "comparison": f"{_OF_PAIRS} {_OF_REFERENCES} {_OF_MOVING} {_OF_SFT} judge sft_on",
}


def _check_task(c: Config) -> None:
    for name in _asked(c, _WITHOUT[c["task"]].split()):
        raise UserError(f"{name}={c[name]!r} has no meaning for task={c['task']}; leave it at {KEYS[name].default!r}")
    if c["task"] in ("sft", "rlhf") and c["sft_on"] == "best_of_n":
        raise UserError(f"sft_on=best_of_n has no meaning for task={c['task']}; use chosen or both")


def _check_rounds(c: Config) -> None:
    if not _collects(c):
        return
    if c["sft_on"] == "best_of_n" and not c["sft_steps"]:
        raise UserError("sft_on=best_of_n has no meaning without sft_steps above 0; leave it at 'chosen'")
    if not c["collect_judge"]:
        raise UserError(
            f"{_collecting(c)}: collect_judge is empty; name what scores the policy's answers, such as gold"
        )
    _refuse_same_judge(c, c["collect_judge"])
    if not c["rounds"]:
        return
    if c["num_steps"] % c["rounds"]:
        raise UserError(f"num_steps={c['num_steps']} does not divide over rounds={c['rounds']}; use a multiple of it")
    if c["reference_cache"]:
        raise UserError("reference_cache=True keeps values of the dataset's pairs, and rounds collect others; leave it")
    if c["round_reference"] == "previous" and c["reference_sync_steps"]:
        raise UserError("round_reference=previous and reference_sync_steps both move the reference; leave one of them")
    if c["round_reference"] == "previous" and not needs_reference(parse_loss(c["loss"])):
        raise UserError(f"round_reference=previous: loss={c['loss']} has no reference; leave it at 'first'")
    if c["round_reference"] == "previous" and c["reference_offload"]:
        raise UserError("round_reference=previous moves the reference on the device; set reference_offload=False")
    if c["round_reference"] == "previous" and c["lora_rank"]:
        raise UserError("round_reference=previous: with lora_rank above 0 the frozen base is the reference; leave it")


def _refuse_same_judge(c: Config, trained_against: str) -> None:
    both = same_judges(c["judge"], trained_against) if c["judge"] else []
    if both and not c["same_judge"]:
        raise UserError(
            f"judge={c['judge']} would grade what {both[0]} was asked for in training, and a judge that is trained "
            "against is no measure of quality; name another judge, or set same_judge=True"
        )


def _check_rl(c: Config) -> None:
    if c["task"] not in ("rl", "rlhf"):
        return
    if not c["rl_reward"] and c["task"] == "rl":
        raise UserError("task=rl: rl_reward is empty; name what answers are worth, such as a reward model's directory")
    if c["rl_reward"]:
        _refuse_same_judge(c, ",".join(name for name, _ in weighted_names(c["rl_reward"])))
    if c["rl_top_p"] < 1 and not c["rl_correction"]:
        raise UserError(
            f"rl_top_p={c['rl_top_p']:g}: answers would be of another distribution than the loss takes them for; leave "
            "it at 1, or correct for it with rl_correction=2"
        )
    updates = c["rl_epochs"] * c["rl_minibatches"]
    if c["num_steps"] % updates:
        raise UserError(
            f"num_steps={c['num_steps']} does not divide over the {updates} updates from answers that are drawn "
            "together (rl_epochs x rl_minibatches); use a multiple of it"
        )
    for name in _asked(c, ("rl_kl",) if not c["rl_kl_coef"] else ()):
        raise UserError(f"{name}={c[name]} has no meaning with rl_kl_coef=0; leave it at {KEYS[name].default}")


def _collects(c: Config) -> bool:
    """Whether pairs of the policy's own answers are collected."""
    return c["rounds"] > 0 or c["sft_on"] == "best_of_n"


def _collecting(c: Config) -> str:
    return f"rounds={c['rounds']}" if c["rounds"] else f"sft_on={c['sft_on']}"


RULES = (_check_task, _check_owners, _check_hyperparameters, _check_loss, _check_reference, _check_rounds, _check_rl)
