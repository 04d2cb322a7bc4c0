"""Train a policy on preferences: `python -m dpo_jax.train --config=configs/hhh.py[:PRESET] --workdir=DIR`.

The only reader of the config: everything else takes named values. Exit codes: 0 done, 2 bad input (one line on
standard error, before anything is compiled), 143 stopped by SIGTERM after saving (the same command goes on).
"""

import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Whatever is on the machine besides: transformers is asked for tokenizers and configs only.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.sharding import Mesh

from dpo_jax import checkpoint, metrics, report, sample, tiny, weights
from dpo_jax.attention import Slots
from dpo_jax.config import check, claim_workdir, parse
from dpo_jax.data.packing import RowLimits
from dpo_jax.data.pipeline import ChosenOnly, Schedule, StepSource, make_schedule
from dpo_jax.data.prepare import DataRequest, Pairs, Prepared, prepare
from dpo_jax.errors import UserError
from dpo_jax.logprobs import pair_logps
from dpo_jax.loop import Phase, Stopped, evaluate, run_phase, stop_signal
from dpo_jax.losses import LOSSES
from dpo_jax.model import ModelConfig, Params, hidden_states, init_params, unembedding
from dpo_jax.optim import optimizer, schedule
from dpo_jax.sharding import (
    axis_rules,
    local_rows,
    make_mesh,
    param_shardings,
    replicated,
    row_shards,
    state_shardings,
)
from dpo_jax.step import (
    LogpsFn,
    Objective,
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
    preference_objective,
    sft_objective,
)


@dataclasses.dataclass(frozen=True)
class Policy:
    """The model to train: its numbers, where its files lie (None: made from scratch), and its tokenizer."""

    config: ModelConfig
    directory: Path | None
    tokenizer_directory: Path
    tokenizer: Any


def _tokenizer(directory: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as e:
        first = str(e).strip().splitlines()[0]
        raise UserError(f"no tokenizer can be read from {directory} ({first}); put tokenizer.json there") from None


def _find_policy(c: Mapping[str, Any], workdir: Path) -> tuple[Policy, str]:
    """The policy, and where the dataset's raw files lie (changed only for synthetic dialogues)."""
    dataset_path = c["dataset_path"]
    if c["dataset"] == "synthetic" and not dataset_path:
        dataset_path = str(tiny.write_dialogues(workdir / "synthetic", c["seed"]))
    if c["model"] == "tiny":
        dialogues = tiny.write_dialogues(workdir / "synthetic", c["seed"])
        directory = tiny.write_tokenizer(workdir / "tokenizer", dialogues)
        tokenizer = _tokenizer(directory)
        return Policy(tiny.model_config(len(tokenizer)), None, directory, tokenizer), dataset_path
    directory = weights.resolve(c["model"])
    config, _ = weights.read_config(directory)
    policy = Policy(config, directory, directory, _tokenizer(directory))
    if len(policy.tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {len(policy.tokenizer)} tokens, its model {config.vocab_size}: they do not "
            "belong together"
        )
    return policy, dataset_path


def _prepare(c: Mapping[str, Any], policy: Policy, dataset_path: str, workdir: Path) -> Prepared:
    request = DataRequest(
        dataset=c["dataset"],
        dataset_path=dataset_path,
        eval_path=c["eval_path"],
        eval_pairs=c["eval_pairs"],
        seed=c["seed"],
        prompt_format=c["prompt_format"],
        max_prompt_length=c["max_prompt_length"],
        max_completion_length=c["max_completion_length"],
        overlong=c["overlong"],
        drop_ties=c["drop_ties"],
        max_bad_fraction=c["max_bad_fraction"],
        cache_dir=c["cache_dir"],
    )
    prepared = prepare(request, policy.tokenizer, workdir / "quarantine.jsonl")
    (workdir / "data.json").write_text(json.dumps(prepared.report, indent=1, ensure_ascii=False) + "\n")
    return prepared


def _row_limits(c: Mapping[str, Any], config: ModelConfig, mesh: Mesh) -> RowLimits:
    platform = mesh.devices.flat[0].platform
    # One key costs 4·H·E operations (scores and values), a token 2 per weight of a layer; on CPU softmax and small
    # products make a key about four times as dear.
    layer = (config.parameter_count() - config.vocab_size * config.hidden_size) / config.num_hidden_layers
    key_cost = 4 * config.num_attention_heads * config.head_dim / (2 * layer)
    return RowLimits(
        row_multiple=row_shards(mesh) * c["microbatches"],
        width_multiple=128 if platform == "tpu" else 16,
        key_cost=key_cost * (4 if platform == "cpu" else 1),
    )


def _check_batch(c: Mapping[str, Any], mesh: Mesh, train: Pairs) -> None:
    shards, micro, size = row_shards(mesh), c["microbatches"], c["batch_size"]
    parts = shards * micro
    if size % parts:
        near = [x for x in (size // parts * parts, -(-size // parts) * parts) if x > 0]
        raise UserError(
            f"batch_size={size} does not divide over {shards} data shards x {micro} microbatches; use a multiple of "
            f"{parts} ({' or '.join(map(str, dict.fromkeys(near)))})"
        )
    if len(train) < size and c["drop_remainder"]:
        raise UserError(
            f"batch_size={size} is more than the {len(train)} training pairs; lower it, or drop_remainder=False"
        )


def _logps_fn(config: ModelConfig, rules: Any, *, dtype: Any, remat: str) -> LogpsFn:
    def logps(params: Params, micro: dict[str, jax.Array], slots: Slots) -> jax.Array:
        with nn.logical_axis_rules(rules):
            hidden = hidden_states(params, micro, config=config, slots=slots, dtype=dtype, remat=remat)
            return pair_logps(hidden, micro, unembedding(params), slots=slots, pairs_per_row=micro["is_pair"].shape[-1])

    return logps


def _load_params(policy: Policy, shardings: Any, dtype: Any, seed: int) -> Params:
    if policy.directory is not None:
        return weights.load(policy.directory, policy.config, shardings, dtype)

    def fresh(key: jax.Array) -> Params:
        return jax.tree.map(lambda p: p.astype(dtype), nn.meta.unbox(init_params(key, policy.config)))

    return jax.jit(fresh, out_shardings=shardings)(jax.random.key(seed))


@functools.partial(jax.jit, static_argnames="dtype")
def _copied(params: Params, dtype: Any) -> Params:
    """A copy in another dtype; a real one even in the same dtype, as the original is donated."""
    return jax.tree.map(lambda p: jnp.array(p, dtype, copy=True), params)


def _source(c: Mapping[str, Any], plan: Schedule, mesh: Mesh, steps: int, microbatches: int) -> StepSource:
    rows = {s.rows // microbatches: local_rows(mesh, s.rows // microbatches) for s in plan.shapes}
    return StepSource(plan, microbatches, rows, steps)


def _warmup(value: float, total: int) -> int:
    return math.ceil(value * total) if value < 1 else int(value)


class _Run:
    """What the phases of one run share, built once from the config."""

    def __init__(self, c: Mapping[str, Any], workdir: Path, mesh: Mesh, policy: Policy, data: Prepared):
        self.c, self.workdir, self.mesh, self.policy, self.data = c, workdir, mesh, policy, data
        self.param_dtype = jnp.dtype(c["param_dtype"])
        auto = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
        self.dtype = jnp.dtype(auto if c["compute_dtype"] == "auto" else c["compute_dtype"])
        self.shardings = param_shardings(policy.config, mesh)
        self.limits = _row_limits(c, policy.config, mesh)
        rules = axis_rules(policy.config, mesh)
        self.logps = _logps_fn(policy.config, rules, dtype=self.dtype, remat=c["remat"])
        self.preference = preference_objective(
            LOSSES[c["loss"]], beta=c["dpo_beta"], label_smoothing=c["label_smoothing"]
        )

    def plan(self, pairs: Any, *, train: bool) -> Schedule:
        c = self.c
        limits = self.limits if train else dataclasses.replace(self.limits, row_multiple=row_shards(self.mesh))
        return make_schedule(
            pairs,
            c["batch_size"],
            limits,
            seed=c["seed"],
            shuffle=c["shuffle"] if train else True,
            drop_remainder=c["drop_remainder"] if train else False,
        )

    def transformation(self, peak: float, kind: str, steps: int):
        c = self.c
        rate = schedule(kind, peak=peak, warmup_steps=_warmup(c["warmup_steps"], steps), total_steps=steps)
        tx = optimizer(c["optimizer"], rate, weight_decay=c["weight_decay"], max_grad_norm=c["max_grad_norm"])
        return tx, rate

    def train_step(self, objective: Objective, tx: Any, rate: Any):
        return make_train_step(self.logps, objective, tx, rate, compute_dtype=self.dtype)

    def start_state(self, params: Params, tx: Any) -> TrainState:
        return jax.jit(init_state, static_argnums=1, donate_argnums=0, out_shardings=self.state_sharding(tx))(
            params, tx
        )

    def abstract_params(self, dtype: Any) -> Any:
        shapes = jax.eval_shape(lambda: nn.meta.unbox(init_params(jax.random.key(0), self.policy.config)))
        return jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, dtype, sharding=s), shapes, self.shardings)

    def state_sharding(self, tx: Any) -> TrainState:
        params = self.abstract_params(self.param_dtype)
        opt_state = state_shardings(tx, params, self.shardings, self.mesh)
        return TrainState(replicated(self.mesh), self.shardings, opt_state)

    def abstract_state(self, tx: Any) -> TrainState:
        shapes = jax.eval_shape(lambda p: init_state(p, tx), self.abstract_params(self.param_dtype))
        return checkpoint.abstract(shapes, self.state_sharding(tx))


def _check_reference(directory: Path, config: ModelConfig) -> None:
    theirs = dataclasses.asdict(weights.read_config(directory)[0])
    ours = dataclasses.asdict(config)
    irrelevant = ("model_type", "max_position_embeddings")
    different = [
        f"{k}: {theirs[k]!r}, the policy {ours[k]!r}" for k in ours if k not in irrelevant and theirs[k] != ours[k]
    ]
    if different:
        raise UserError(f"reference {directory} is another architecture than the policy ({'; '.join(different)})")


def _reference(run: _Run, state: TrainState, resumed: bool) -> Params:
    """The reference's parameters: named, else the policy as it is when DPO starts."""
    c, policy = run.c, run.policy
    if c["reference"]:
        directory = weights.resolve(c["reference"], what="reference")
        _check_reference(directory, policy.config)
        return weights.load(directory, policy.config, run.shardings, run.dtype)
    if policy.directory is not None and not c["sft_steps"]:
        return weights.load(policy.directory, policy.config, run.shardings, run.dtype)
    saved = run.workdir / "reference"
    if resumed and not saved.exists():
        raise UserError(f"{saved}, the reference that this run made, is gone; start again in a new workdir")
    if not resumed:  # this run made it, so nobody else can bring it back
        checkpoint.save_tree(saved, _copied(state.params, run.dtype))
    return checkpoint.restore_tree(saved, run.abstract_params(run.dtype))


def _answer(run: _Run, params: Params, when: str, step: int) -> list[dict[str, Any]]:
    """Greedy and sampled answers to the first held-out prompts, also appended to samples.jsonl."""
    c, tokenizer = run.c, run.policy.tokenizer
    pairs = run.data.evaluation if len(run.data.evaluation) else run.data.train
    shown = [pairs[i] for i in range(min(c["sample_prompts"], len(pairs)))]
    if not shown:
        return []
    stop = sorted({tokenizer.eos_token_id, *(int(chosen[-1]) for _, chosen, _ in shown if _ends(tokenizer, chosen))})
    records = []
    for mode, temperature, top_p in (("greedy", 0.0, 1.0), ("sampled", c["sample_temperature"], c["sample_top_p"])):
        answers = sample.generate(
            params,
            [list(map(int, prompt)) for prompt, _, _ in shown],
            config=run.policy.config,
            stop=stop,
            new_tokens=c["sample_tokens"],
            temperature=temperature,
            top_p=top_p,
            seed=c["seed"],
            dtype=run.dtype,
        )
        for (prompt, chosen, rejected), ids in zip(shown, answers, strict=True):
            text = [tokenizer.decode(x, skip_special_tokens=True).strip() for x in (prompt, ids, chosen, rejected)]
            texts = dict(zip(("prompt", "answer", "chosen", "rejected"), text, strict=True))
            records.append({"when": when, "step": step, "mode": mode} | texts)
    if jax.process_index() == 0:
        with (run.workdir / "samples.jsonl").open("a", encoding="utf-8") as f:
            f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    return records


def _ends(tokenizer: Any, completion: np.ndarray) -> bool:
    return int(completion[-1]) in tokenizer.all_special_ids


def _forget_after(workdir: Path, sft_steps: int, done: int) -> None:
    """Drop the records of updates that the checkpoint at `done` (of both phases) does not hold: they come again."""
    in_dpo = done - sft_steps
    if done == 0:
        in_dpo = -1  # nothing is saved yet: also the evaluation at step 0 comes again

    def keep(record: dict[str, Any]) -> bool:
        if record.get("split") == "sft":
            return record["step"] <= min(done, sft_steps)
        # At the boundary the optimiser starts anew, and so does the evaluation at step 0.
        return record["step"] <= in_dpo if in_dpo > 0 else False

    for name in ("metrics.jsonl", "samples.jsonl"):
        if (workdir / name).exists():
            metrics.truncate(workdir / name, keep)


def run(config: Mapping[str, Any], workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Run one config to its end in `workdir`, or go on with the run that is there.

    Args:
      config: the keys of `configs/common.py`, such as `configs.hhh.get_config("tiny")`.
      workdir: the run's directory.

    Returns:
      The held-out metrics at the end (of the last step's batch where nothing is held out).

    Raises:
      UserError: bad input, said in one line.
      Stopped: SIGTERM came; the state is saved and the same call goes on.
    """
    check(config)
    c, workdir = dict(config), Path(workdir)
    claim_workdir(workdir, c, write=False)
    mesh = make_mesh(c["mesh_data"], c["mesh_fsdp"], c["mesh_tensor"])
    claim_workdir(workdir, c, write=jax.process_index() == 0)
    policy, dataset_path = _find_policy(c, workdir)
    axis_rules(policy.config, mesh)
    data = _prepare(c, policy, dataset_path, workdir)
    _check_batch(c, mesh, data.train)
    with jax.set_mesh(mesh), stop_signal() as stop:
        return _train(_Run(c, workdir, mesh, policy, data), stop)


def _train(run: _Run, stop: Any) -> dict[str, float]:
    c, workdir, mesh = run.c, run.workdir, run.mesh
    main_process = jax.process_index() == 0
    plan = run.plan(run.data.train, train=True)
    sft_steps = c["sft_steps"]
    steps = c["num_steps"] or max(1, round(c["num_epochs"] * plan.steps_per_epoch))
    tx, rate = run.transformation(c["learning_rate"], c["lr_schedule"], steps)

    with checkpoint.open_checkpoints(workdir / "checkpoints", c["keep_checkpoints"]) as checkpoints:
        done = checkpoint.latest_step(checkpoints) or 0
        if main_process:
            _forget_after(workdir, sft_steps, done)
        writer = metrics.MetricsWriter(
            workdir if main_process else None, total_steps={"sft": sft_steps, "train": steps}, quiet=not main_process
        )
        with writer:
            _introduce(run, plan, done, writer)
            if done > sft_steps:
                state = checkpoint.restore(checkpoints, done, run.abstract_state(tx))
            else:
                params = _after_sft(run, checkpoints, done, writer, stop)
                state = run.start_state(params, tx)
                del params
            ref_params = _reference(run, state, resumed=done > sft_steps)
            if done <= sft_steps:
                _answer(run, state.params, "before", 0)
            phase = Phase(
                "train",
                _source(c, plan, mesh, steps, c["microbatches"]),
                run.train_step(run.preference, tx, rate),
                log_every=c["log_every"],
                eval_every=c["eval_every"],
                checkpoint_every=c["checkpoint_every"],
                evaluate=_evaluator(run, ref_params),
                save=lambda n, s: checkpoint.save(checkpoints, sft_steps + n, s),
            )
            with jax.transfer_guard_host_to_device("disallow"):
                state = run_phase(
                    phase, state, ref_params, max(0, done - sft_steps), mesh=mesh, writer=writer, stop=stop
                )
            return _finish(run, state, steps, writer)


def _introduce(run: _Run, plan: Schedule, done: int, writer: metrics.MetricsWriter) -> None:
    c, n = run.c, run.policy.config.parameter_count()
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    shape = plan.shapes[0]
    writer.message(f"model {c['model']}: {n:,} parameters, {run.dtype} on {mesh} ({run.mesh.devices.flat[0].platform})")
    writer.message(
        f"data {c['dataset']}: {len(run.data.train):,} training pairs, {len(run.data.evaluation):,} held out "
        f"({run.data.report['held_out']})"
    )
    writer.message(
        f"rows {shape.rows} x [{shape.prompt} | {shape.chosen} | {shape.rejected}] for {c['batch_size']} pairs"
    )
    if done:
        writer.message(f"going on from checkpoint {done}")


def _after_sft(run: _Run, checkpoints: Any, done: int, writer: metrics.MetricsWriter, stop: Any) -> Params:
    """The policy's parameters when DPO starts: loaded or fresh, after what is left of the SFT phase."""
    c, steps = run.c, run.c["sft_steps"]
    if not steps:
        return _load_params(run.policy, run.shardings, run.param_dtype, c["seed"])
    tx, rate = run.transformation(c["sft_learning_rate"], "constant", steps)
    if done:
        state = checkpoint.restore(checkpoints, done, run.abstract_state(tx))
    else:
        params = _load_params(run.policy, run.shardings, run.param_dtype, c["seed"])
        state = run.start_state(params, tx)
    if done < steps:
        plan = run.plan(ChosenOnly(run.data.train), train=True)
        phase = Phase(
            "sft",
            _source(c, plan, run.mesh, steps, c["microbatches"]),
            run.train_step(sft_objective(), tx, rate),
            log_every=c["log_every"],
            eval_every=0,
            checkpoint_every=c["checkpoint_every"],
            evaluate=None,
            save=lambda n, s: checkpoint.save(checkpoints, n, s),
        )
        with jax.transfer_guard_host_to_device("disallow"):
            state = run_phase(phase, state, None, done, mesh=run.mesh, writer=writer, stop=stop)
    return state.params


def _evaluator(run: _Run, ref_params: Params):
    held_out = run.data.evaluation
    if not len(held_out):
        return None
    plan = run.plan(held_out, train=False)
    source = _source(run.c, plan, run.mesh, plan.steps_per_epoch, 1)
    eval_step = make_eval_step(run.logps, run.preference, compute_dtype=run.dtype)
    return lambda state: evaluate(eval_step, state.params, ref_params, source, run.mesh)


def _finish(run: _Run, state: TrainState, steps: int, writer: metrics.MetricsWriter) -> dict[str, float]:
    """Answers after training, the export, the report and the final table."""
    c, workdir = run.c, run.workdir
    answered = metrics.read(workdir / "samples.jsonl") if (workdir / "samples.jsonl").exists() else []
    if not any(r["when"] == "after" for r in answered):
        answered += _answer(run, state.params, "after", steps)
    if c["export"] and not (workdir / "export" / "config.json").exists():
        if run.policy.directory is not None:
            source = weights.read_config(run.policy.directory)[1]
        else:
            tokens = {f"{name}_token_id": getattr(run.policy.tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
            source = weights.hf_config(run.policy.config, **tokens)
        weights.save(
            state.params,
            source,
            workdir / "export",
            dtype=run.param_dtype,
            tokenizer_from=run.policy.tokenizer_directory,
        )
    records = metrics.read(workdir / "metrics.jsonl")
    if jax.process_index() == 0:
        report.write(workdir)
        writer.table("Held-out pairs", metrics.before_after(records))
        _show_answers(answered, writer)
        writer.message(f"report {workdir / 'report.html'}" + (f", policy {workdir / 'export'}" if c["export"] else ""))
    last = [r for r in records if r["split"] == ("eval" if len(run.data.evaluation) else "train")]
    return {k: v for k, v in last[-1].items() if k != "split"} if last else {}


def _show_answers(answered: Sequence[Mapping[str, Any]], writer: metrics.MetricsWriter) -> None:
    """Greedy answers before and after, side by side, on the console."""
    by_when = {
        w: {r["prompt"]: r for r in answered if r["when"] == w and r["mode"] == "greedy"} for w in ("before", "after")
    }
    rows = [
        (p, r["answer"], by_when["after"][p]["answer"]) for p, r in by_when["before"].items() if p in by_when["after"]
    ]
    if rows:
        writer.side_by_side("Answers (greedy)", ("prompt", "before", "after"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        config, workdir = parse(sys.argv if argv is None else argv)
        run(config, workdir)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except Stopped:
        print("stopped by SIGTERM; everything is saved, the same command goes on", file=sys.stderr)
        return 143
    return 0


if __name__ == "__main__":
    sys.exit(main())
