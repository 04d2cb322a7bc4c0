"""The stages of `python -m dpo_jax.rlhf`: each is a run of its own, whose config is made of the whole one. No JAX."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_jax.config.check import check
from dpo_jax.config.keys import KEYS
from dpo_jax.errors import UserError

STAGES = ("sft", "reward", "rl")
_OF_STAGES = ("reward_model", "reward_steps", "reward_learning_rate", "reward_batch_size")
_OF_SFT = ("sft_steps", "sft_learning_rate", "sft_lr_schedule", "sft_on")
_OF_REWARD = ("reward_center", "reward_margin")
_OF_JUDGES = ("judge", "win_rate_prompts", "win_rate_baseline", "same_judge")
_OF_REFERENCES = ("reference", "reference_revision", "reference_offload")
_OF_RL = tuple(name for name in KEYS if name.startswith("rl_"))


@dataclass(frozen=True)
class Stage:
    """A stage: its config, and the keys of it that name exports of earlier stages, with these stages."""

    name: str
    config: Mapping[str, Any]
    made_of: Mapping[str, str]


def read_stages(config: Mapping[str, Any], workdir: Path) -> list[Stage]:
    """The stages that a config with task=rlhf asks for, in their order; each in a directory of its name in `workdir`.

    SFT is left out where `sft_steps` is 0, the reward model where `rl_reward` names what answers are worth.

    Raises:
      UserError: the config of a stage cannot be run.
    """
    c = dict(config)
    if not has_stages(c):
        raise UserError(f"task={c['task']}: python -m dpo_jax.rlhf needs a config with task=rlhf, as configs/rlhf.py")
    export = lambda stage: str(workdir / stage / "export")
    policy = {"model": export("sft"), "revision": ""} if c["sft_steps"] else {}
    found = []
    if c["sft_steps"]:
        changes = {
            "task": "sft",
            "num_steps": c["sft_steps"],
            "learning_rate": c["sft_learning_rate"],
            "lr_schedule": c["sft_lr_schedule"],
            "eval_every": _as_often(c, c["sft_steps"]),
        }
        off = (*_OF_RL, *_OF_REWARD, *_OF_JUDGES, *_OF_REFERENCES, *_OF_SFT[:3])
        found.append(Stage("sft", _made(c, off, changes), {}))
    if not c["rl_reward"]:
        changes = {
            "task": "reward",
            "num_steps": c["reward_steps"],
            "num_epochs": 1.0,
            "learning_rate": c["reward_learning_rate"],
            "batch_size": c["reward_batch_size"] or c["batch_size"],
            "eval_every": _as_often(c, c["reward_steps"]),
        }
        model = {"model": c["reward_model"], "revision": ""} if c["reward_model"] else policy
        off = (*_OF_RL, *_OF_JUDGES, *_OF_REFERENCES, *_OF_SFT, "sample_prompts", "kl_prompts")
        made_of = {"model": "sft"} if model is policy and policy else {}
        found.append(Stage("reward", _made(c, off, changes | model), made_of))
    changes = {"task": "rl", "rl_reward": c["rl_reward"] or export("reward")} | policy
    made_of = ({"model": "sft"} if policy else {}) | ({} if c["rl_reward"] else {"rl_reward": "reward"})
    found.append(Stage("rl", _made(c, (*_OF_REWARD, *_OF_SFT), changes), made_of))
    for stage in found:
        try:
            check(stage.config)
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from None
    return found


def _as_often(config: Mapping[str, Any], steps: int) -> int:
    """`eval_every` of a stage that has so many updates: as many evaluations as RL has, where both numbers are known."""
    every, of_rl = config["eval_every"], config["num_steps"]
    return -(-every * steps // of_rl) if steps and of_rl else every


def _made(config: Mapping[str, Any], off: tuple[str, ...], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a stage: the whole one with what is of other stages at its default, and with `changes`."""
    return {**config, **{name: KEYS[name].default for name in (*_OF_STAGES, *off)}, **changes, "export": True}


def has_stages(config: Mapping[str, Any]) -> bool:
    """Whether a config is of several runs, one after the other."""
    return bool(config["task"] == "rlhf")


def planned(stage: Stage, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stage's config where no stage has been run: the whole config's model has the size of what SFT makes of it."""
    model = {"model": config["model"], "revision": config["revision"]}
    return {**stage.config, **(model if "model" in stage.made_of else {})}


def chosen_stages(stages: list[Stage], names: str) -> list[Stage]:
    """Those of these stages that are named, with commas between; all for an empty text.

    Raises:
      UserError: there is no such stage.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [stage.name for stage in stages]
    for name in wanted:
        if name not in known:
            why = "; this config has no such stage" if name in STAGES else ""
            raise UserError(f"--stages={names}: {name!r} is none of {', '.join(known)}{why}")
    return [stage for stage in stages if not wanted or stage.name in wanted]
