"""A run's config.json: what makes a directory one config's, and what pages show of it.

Runs of other versions lack keys, and have keys that are unknown here.
"""

import contextlib
import errno
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_jax.bucket.client import BucketError
from dpo_jax.config.keys import KEYS
from dpo_jax.disk import is_full, read_json, write_json
from dpo_jax.errors import BAD_INPUT, SAVE_FAILED, UserError
from dpo_jax.records.directory import CONFIG, IDENTITY, MADE_WITH, ROUNDS, checkpoint_directories
from dpo_jax.records.shapes import Identity, MadeWith

# What a reader needs to train a model like it, where it is set at all.
_RECIPE = """
    task loss dpo_beta label_smoothing f_divergence wpo ld_alpha learning_rate lr_schedule warmup_steps optimizer
    weight_decay max_grad_norm reward_center reward_margin batch_size num_epochs sft_steps sft_learning_rate lora_rank
    lora_alpha lora_targets
    max_prompt_length max_completion_length overlong prompt_format chat_template template_date param_dtype seed
""".split()
_OF_RL = """
    rl_reward rl_n rl_loss rl_advantage rl_kl rl_kl_coef rl_temperature rl_top_p rl_correction rl_epochs rl_minibatches
    rl_unfinished rl_length_penalty
""".split()
_OFF = (0, 0.0, "", False, None)
# Keys of DPO's training that the recipe of another task has no use for.
_OF_DPO = ("loss", "dpo_beta", "f_divergence", "ld_alpha", "sft_learning_rate")
_OF_A_MACHINE = ("coordinator_bind",)  # another start may have another, and is the same run
KINDS = {"dpo": "DPO", "reward": "reward model", "comparison": "preference model", "sft": "SFT", "rl": "RL"}


@dataclass(frozen=True)
class SavedConfig:
    """What a saved config holds; what it does not hold is empty, or 0.

    Attributes:
      table: every key with its value, for display.
      recipe: the keys that make the model, those that are off left out.
      words: by topic, what is set, in words: {"Batch": ["64 pairs", "4 microbatches"]}.
    """

    model: str
    dataset: str
    task: str
    judge: str
    loss: str
    steps: int
    sft_steps: int
    lora: bool
    table: Mapping[str, Any]
    recipe: list[tuple[str, Any]]
    words: Mapping[str, list[str]]

    @property
    def is_dpo(self) -> bool:
        """Whether the run minimised DPO's own loss: what is said of ln 2 and of rewards holds for it."""
        return self.task == "dpo" and self.loss in ("", "sigmoid")

    @property
    def is_policy(self) -> bool:
        """Whether the run trained a policy, and no preference model."""
        return self.task in ("dpo", "sft", "rl")

    @property
    def is_reward(self) -> bool:
        """Whether the run trained a reward model."""
        return self.task == "reward"

    @property
    def kind(self) -> str:
        """What was trained, in words."""
        return KINDS.get(self.task, "DPO")

    @property
    def title(self) -> tuple[str, str]:
        """Model and data set for a title: of a path, its last name."""
        return Path(self.model).name, Path(self.dataset).name


def saved_config(table: Mapping[str, Any]) -> SavedConfig:
    """A config.json's object, see `SavedConfig`."""
    get = table.get
    return SavedConfig(
        model=str(get("model") or ""),
        dataset=str(get("dataset") or ""),
        task=str(get("task") or "dpo"),
        judge=str(get("judge") or ""),
        loss=str(get("loss") or ""),
        steps=_whole(get("num_steps")),
        sft_steps=_whole(get("sft_steps")),
        lora=bool(get("lora_rank")),
        table=table,
        recipe=[
            (key, table[key])
            for key in (*_RECIPE, *(_OF_RL if get("task") == "rl" else ()))
            if get(key) not in _OFF
            and not (get("task", "dpo") != "dpo" and key in _OF_DPO)
            and not (get("num_steps") and key == "num_epochs")  # which then decides nothing
        ],
        words={topic: [part for part in parts if part] for topic, parts in _words(table).items()},
    )


def differing_keys(tables: list[Mapping[str, Any]]) -> list[str]:
    """The keys in which saved configs differ."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if len({json.dumps(table.get(key)) for table in tables}) > 1]


def _words(table: Mapping[str, Any]) -> dict[str, list[str]]:
    """By topic, what is set, in words; empty parts are of keys that are off or missing."""
    get = table.get

    def fill(form: str, key: str) -> str:
        return form.format(get(key)) if get(key) else ""

    parts = fill("{} microbatches", "microbatches")
    loss = [fill("{}", "loss"), fill("β {}", "dpo_beta"), fill("label smoothing {}", "label_smoothing")]
    reference = [fill("{}", "reference") or ("the policy when DPO starts" if "reference" in table else "")]
    reward: list[str] = []
    task = get("task", "dpo")
    if task == "comparison":
        reference, loss = [], ["−log p of the right label"]
    if task == "sft":
        reference, loss = [], ["−log p of the answers"]
    if task == "reward":
        reference = []
        loss = ["Bradley-Terry", fill("margin of {}", "reward_margin"), fill("centring {}", "reward_center")]
    if task == "rl":
        kl = f"{get('rl_kl')} at {get('rl_kl_coef')} a nat" if get("rl_kl_coef") else ""
        reference = [fill("{}", "reference") or ("the policy when RL starts" if kl else "")]
        loss = [fill("{}", "rl_loss"), fill("advantage {}", "rl_advantage"), kl]
        reward = [fill("{}", "rl_reward"), fill("{} answers to a prompt", "rl_n")]
    of_batch = "{} prompts" if task == "rl" else "{} pairs"
    return {
        "Reward": reward,
        "Reference": reference,
        "Loss": loss,
        "Learning rate": [fill("{}", "learning_rate"), fill("{}", "lr_schedule"), warm_up(get("warmup_steps"))],
        "Optimizer": [fill("{}", "optimizer"), fill("decay {}", "weight_decay"), fill("clip at {}", "max_grad_norm")],
        "Batch": [fill(of_batch, "batch_size"), parts if get("microbatches") != 1 else ""],
        "SFT first": [fill("{} steps", "sft_steps"), fill("{}", "sft_learning_rate")] if get("sft_steps") else [],
        "Trained": [fill("LoRA of rank {}", "lora_rank") or ("all parameters" if "lora_rank" in table else "")],
        "Precision": [fill("{} parameters", "param_dtype")],
        "Compute": [fill("{} compute", "compute_dtype")],
        "Longest, in tokens": [fill("prompt {}", "max_prompt_length"), fill("completion {}", "max_completion_length")],
        "Mesh": [fill("data {}", "mesh_data"), fill("fsdp {}", "mesh_fsdp"), fill("tensor {}", "mesh_tensor")],
    }


def warm_up(steps: float | None) -> str:
    """The warm-up in words: below 1 it is a fraction.

    >>> warm_up(0.1), warm_up(20), warm_up(0)
    ('10% warm-up', '20 warm-up steps', '')
    """
    if not isinstance(steps, int | float) or not steps:
        return ""
    return f"{steps:.0%} warm-up" if steps < 1 else f"{steps:g} warm-up steps"


def _whole(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0


def claim_workdir(workdir: Path, config: Mapping[str, Any], write: bool, checkpoints: bool = True) -> None:
    """Compare `workdir` with this config, or (`write`) make it this config's by its config.json.

    Checkpoints know the config that they were made with, so that nothing else is gone on with where config.json is
    lost. A key that is not there counts as its default: a version that did not have it yet began the run.

    Args:
      checkpoints: False where damaged ones have not been set aside yet, whose word is not to be taken.

    Raises:
      UserError: the directory belongs to another config, or cannot be written.
    """
    path, mine = workdir / CONFIG, dict(config)
    for place, saved in _begun_with(workdir, checkpoints):
        theirs = {name: key.default for name, key in KEYS.items()} | saved
        compared = sorted({*mine, *theirs}.difference(_OF_A_MACHINE))
        changed = [k for k in compared if mine.get(k) != theirs.get(k)]
        if changed:
            difference = ", ".join(f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} asked" for k in changed)
            mend = "use another --workdir or its config"
            raise UserError(f"{place} holds a run of another config ({difference}); {mend}")
    if path.exists():
        return
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        if write:
            write_json(path, mine, sort_keys=True)


def _begun_with(workdir: Path, checkpoints: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The configs that a run's directory has, with what has them."""
    if (workdir / CONFIG).exists():
        mend = "restore it, or delete it: checkpoints know the config that they were made with"
        yield workdir, read_json(workdir / CONFIG, mend)
    if not checkpoints:
        return
    for directory in checkpoint_directories(workdir).values():
        if (said := _config_in(directory / MADE_WITH, MadeWith)) is not None:
            yield directory, said
    if (workdir / ROUNDS).exists() and (said := _config_in(workdir / IDENTITY, Identity)) is not None:
        yield workdir / ROUNDS, said  # pairs that were collected before there was a checkpoint


def _config_in(path: Path, shape: Any) -> dict[str, Any] | None:
    """The config in one of a run's files; None: there is none, or whoever uses the file says what is wrong with it."""
    try:
        found: dict[str, Any] | None = read_json(path, shape=shape).get("config")
        return found
    except BucketError:  # which says nothing about the file
        raise
    except UserError:
        return None


@contextlib.contextmanager
def writing(workdir: Path) -> Iterator[None]:
    """Write to a workdir in here.

    Raises:
      UserError: it cannot be written.
    """
    try:
        yield
    except OSError as e:
        at = Path(e.filename2 or e.filename or str(workdir))
        of = f": {at.name}" if at.parent == workdir and not at.name.startswith(".") else ""
        mend = "choose another --workdir"
        if is_full(e):
            mend = "make room there, then give the same command"
        elif e.errno == errno.EISDIR:
            mend = "move that directory elsewhere, then give the same command"
        code = SAVE_FAILED if is_full(e) else BAD_INPUT
        raise UserError(f"workdir {workdir} cannot be written ({e.strerror}{of}); {mend}", code=code) from None
