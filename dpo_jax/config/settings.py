"""A checked config as typed values: the only place where its keys are read. Plain values, no JAX.

Keys are flat because people type them; code takes them in groups, each named after what it is for.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.config.values import parse_options, parse_targets
from dpo_jax.data.files import is_remote
from dpo_jax.data.prepare import DataRequest
from dpo_jax.data.sources import find_sources, hub_dataset, parse_mixture
from dpo_jax.errors import UserError
from dpo_jax.model.options import LayoutOptions, Lora
from dpo_jax.objective.rl_table import RlOptions, parse_unfinished
from dpo_jax.objective.table import parse_loss
from dpo_jax.rows.shape import Order
from dpo_jax.sampling.selection import Selection
from dpo_jax.weights.hub import local_model

# Keys that name places on a host's own disk, which may differ between the hosts of one run.
_OF_THE_HOST = (
    "model", "reference", "judge", "collect_judge", "rl_reward", "win_rate_baseline", "dataset_path", "eval_path",
    "cache_dir", "compilation_cache", "coordinator_bind",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """`size` pairs a step, exactly, in `microbatches` parts; in which order they come."""

    size: int
    microbatches: int
    order: Order


@dataclasses.dataclass(frozen=True)
class ObjectiveOptions:
    """What is minimised.

    Attributes:
      task: "dpo"; or "reward" or "comparison", for which `balance` and `center` alone count.
      center: weight of the squared sum of both scores.
      parts: losses with their weights; `hyperparameters` are of single ones, by name.
      balance: weight of the experts' load-balancing loss; 0 is off.
      beta, ld_alpha, wpo, f_divergence, f_alpha: see `keys.py`.
    """

    task: str
    center: float
    parts: Mapping[str, float]
    beta: float
    balance: float
    ld_alpha: float
    wpo: bool
    f_divergence: str
    f_alpha: float
    hyperparameters: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class ReferenceOptions:
    """The reference: `name` (empty: the policy when DPO starts), and what becomes of it.

    `revision` is the hub's. With `cache` its log-probabilities are computed once and its memory is freed. Every
    `sync_every` updates (0: never) it moves towards the policy by `sync_alpha`; where it `follows`, it becomes the
    policy whenever a round begins.
    """

    name: str
    revision: str
    cache: bool
    sync_every: int
    sync_alpha: float
    follows: bool

    @property
    def moves(self) -> bool:
        return self.follows or self.sync_every > 0


@dataclasses.dataclass(frozen=True)
class RoundOptions:
    """Rounds of collecting pairs of the policy's own answers; `count` 0: there are none.

    Attributes:
      prompts: answered in a round, `n` times each at `temperature`.
      sft_on: what SFT trains on: "chosen", "both", or "best_of_n" of the same number of prompts.
      judge: scores the answers; `rules` say which become pairs.
    """

    count: int
    prompts: int
    sft_on: str
    judge: str
    n: int
    temperature: float
    rules: Selection


@dataclasses.dataclass(frozen=True)
class RlRun:
    """RL against a reward.

    Attributes:
      reward: what answers are worth, by its name.
      n: answers to a prompt, at `temperature` and `top_p`.
      epochs, minibatches: passes over the answers that were drawn together, and updates of a pass.
      unfinished: "score", "drop", or what an answer that is cut off is worth.
      length_penalty: taken from a reward for each token.
      keeps_best: whether the policy of the best evaluation is exported, else the last one.
      options: what a step minimises.
    """

    reward: str
    n: int
    temperature: float
    top_p: float
    epochs: int
    minibatches: int
    unfinished: str | float
    length_penalty: float
    keeps_best: bool
    options: RlOptions

    @property
    def updates(self) -> int:
        """Updates from answers that were drawn together."""
        return self.epochs * self.minibatches


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """An optimiser and its learning rate; a `warmup` below 1 is a fraction of all updates."""

    kind: str
    peak: float
    schedule: str
    warmup: float
    weight_decay: float
    max_grad_norm: float


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run as its config asks for it: keys that belong together as groups, the others by their own names.

    Attributes:
      whole: the config itself, to be written down and shown.
      mesh: sizes of the axes data, fsdp and tensor; -1: what is left.
      trackers: the project in each of `records.trackers.TRACKERS`; empty is off.
    """

    whole: Mapping[str, Any]
    data: DataRequest
    batch: BatchOptions
    objective: ObjectiveOptions
    reference: ReferenceOptions
    rounds: RoundOptions
    rl: RlRun
    optimizer: OptimizerOptions
    sft_optimizer: OptimizerOptions
    lora: Lora | None
    layout: LayoutOptions
    mesh: tuple[int, int, int]
    trackers: Mapping[str, str]
    seed: int
    task: str
    model: str
    revision: str
    num_steps: int
    num_epochs: float
    sft_steps: int
    remat: str
    compilation_cache: str
    max_bad_steps: int
    stuck_after_seconds: float
    log_every: int
    eval_every: int
    checkpoint_every: int
    keep_checkpoints: int
    export: bool
    kl_prompts: int
    judge: str
    win_rate_prompts: int
    win_rate_baseline: str
    sample_prompts: int
    sample_tokens: int
    sample_temperature: float
    sample_top_p: float

    @property
    def trains_policy(self) -> bool:
        """Whether the model that is trained says answers, and judges none."""
        return self.task in ("dpo", "sft", "rl")

    @property
    def same_on_all_hosts(self) -> dict[str, Any]:
        """What all processes of a run must be given alike."""
        return {key: value for key, value in self.whole.items() if key not in _OF_THE_HOST}

    def with_batch_size(self, size: int) -> "Settings":
        """The same with other batches."""
        return read_settings({**self.whole, "batch_size": size})


def read_settings(config: Mapping[str, Any]) -> Settings:
    """The typed values of a config that `check` has passed."""
    c = config

    def read(kind: type, **given: Any) -> Any:
        """A group whose values are those `given`, and for the rest those of the keys of its fields' names."""
        return kind(**{f.name: c[f.name] for f in dataclasses.fields(kind) if f.name not in given}, **given)

    lora = Lora(c["lora_rank"], c["lora_alpha"], parse_targets(c["lora_targets"]), c["lora_rslora"])
    optimizer = OptimizerOptions(
        c["optimizer"], c["learning_rate"], c["lr_schedule"], c["warmup_steps"], c["weight_decay"], c["max_grad_norm"]
    )
    return read(
        Settings,
        whole=dict(config),
        # Where answers of the policy's own are all that is trained on, prompts alone will do.
        data=read(DataRequest, prompts=c["task"] == "rl" and not c["sft_steps"]),
        batch=BatchOptions(c["batch_size"], c["microbatches"], Order(c["seed"], c["shuffle"], c["drop_remainder"])),
        objective=read(
            ObjectiveOptions,
            parts=parse_loss(c["loss"]),
            beta=c["dpo_beta"],
            center=c["reward_center"],
            balance=c["router_aux_loss_coef"],
            hyperparameters={n: c[n] for n in ("label_smoothing", "simpo_gamma", "cpo_alpha", "discopop_tau")},
        ),
        reference=ReferenceOptions(
            c["reference"],
            c["reference_revision"],
            c["reference_cache"],
            c["reference_sync_steps"],
            c["reference_sync_alpha"],
            c["round_reference"] == "previous" and c["rounds"] > 0,
        ),
        num_steps=steps_of_rounds(c) if c["rounds"] else c["num_steps"],
        rounds=RoundOptions(
            c["rounds"],
            c["round_prompts"],
            c["sft_on"],
            c["collect_judge"],
            c["collect_n"],
            c["collect_temperature"],
            Selection(c["collect_mode"], c["collect_length_penalty"], c["collect_min_margin"], c["collect_unfinished"]),
        ),
        rl=_rl(c),
        optimizer=optimizer,
        sft_optimizer=dataclasses.replace(optimizer, peak=c["sft_learning_rate"], schedule=c["sft_lr_schedule"]),
        lora=lora if lora.rank else None,
        layout=read(
            LayoutOptions,
            base_dtype=c["lora_base_dtype"],
            compiler_options=parse_options(c["compiler_options"]),
            longest=c["max_prompt_length"] + c["max_completion_length"],
        ),
        mesh=(c["mesh_data"], c["mesh_fsdp"], c["mesh_tensor"]),
        trackers={"wandb": c["wandb_project"], "trackio": c["trackio_project"]},
    )


def _rl(c: Mapping[str, Any]) -> RlRun:
    own = lambda name: None if c[name] == -1 else c[name]  # -1 is what is usual for the loss
    options = RlOptions(
        loss=c["rl_loss"],
        clip_low=own("rl_clip_low"),
        clip_high=own("rl_clip_high"),
        advantage=c["rl_advantage"],
        kl=c["rl_kl"],
        kl_coef=c["rl_kl_coef"],
        correction_cap=c["rl_correction"],
        temperature=c["rl_temperature"],
        max_tokens=c["max_completion_length"],
        balance=c["router_aux_loss_coef"],
    )
    names = ("reward", "n", "temperature", "top_p", "epochs", "minibatches", "length_penalty")
    return RlRun(
        **{name: c[f"rl_{name}"] for name in names},
        unfinished=parse_unfinished(c["rl_unfinished"]),
        keeps_best=c["rl_keep"] == "best",
        options=options,
    )


def steps_of_rounds(config: Mapping[str, Any]) -> int:
    """Updates of all rounds together: as many as are asked for, or one for every batch of prompts."""
    of_a_round = -(-config["round_prompts"] // config["batch_size"])
    return config["num_steps"] or config["rounds"] * of_a_round


def check_paths(settings: Settings) -> None:
    """Look for the model, the reference and the data where they are local, before anything slow is imported.

    What is on the hub, or in a bucket, is looked for when it is needed.

    Raises:
      UserError: one of them is not there; says what to give.
    """
    for what, name in (("model", settings.model), ("reference", settings.reference.name)):
        if name and name != "tiny":
            local_model(name, what=what)
    if settings.win_rate_baseline and not Path(settings.win_rate_baseline).expanduser().is_file():
        raise UserError(f"win_rate_baseline={settings.win_rate_baseline}: there is no such file")
    rewards = [part.partition("*")[0] for part in settings.rl.reward.split(",")]
    for judge in (*settings.judge.split(","), *settings.rounds.judge.split(","), *rewards):
        if judge.startswith((".", "/", "~", "gs://")):
            local_model(judge, what="judge")
    data = settings.data
    names = [name for name, _ in parse_mixture(data.dataset)]
    elsewhere = any(map(is_remote, (*names, *data.dataset_path.split(","), data.eval_path)))
    made = not data.dataset_path and any(name == "synthetic" or hub_dataset(name) for name in names)
    if not elsewhere and not made:
        at = (data.dataset, data.dataset_path, data.eval_path, data.split)
        find_sources(*at, columns=data.columns, revision=data.dataset_revision)
