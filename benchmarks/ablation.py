"""What each part of dpo_jax's step is worth: the same step and the same pairs with one part left out at a time.

    python -m benchmarks.ablation --out FILE.json --steps 5 -- --config=... --workdir=... [dpo_jax.train's FLAGS]

Every variant is `step.make_train_step` with the product's model, loss and optimiser; what differs is how the pairs lie
in rows, which hidden states are projected to the vocabulary, and arguments such as the chunk's size. Steps of the
plan's common shape are taken. First every variant takes one step from the same start: log-probabilities and the
gradient's norm must agree, so all do the same work. Then they take turns, one step each, on the pairs of step 1, 2, ...

    no sharing       a prompt lies before each of its completions: computed twice, in rows of the same pairs
    no packing       one pair a row, padded to the longest prompt and completions of all these steps, as one compiled
                     shape must be; four pairs at once, as sixteen do not fit in 16 GB
    no skipping      attention as dense blocks: scores for the keys of all pairs of a row, those of others masked
    whole logits     the hidden states of all tokens are projected, not only those that predict completions, and the
                     logits of half of them, which is the most that the code allows, exist at one time
    no chunks        the logits of half of the completion tokens exist at one time, for the whole vocabulary
    cached reference the reference's log-probabilities come with the batch (`reference_cache`)
"""

import argparse
import collections
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import numpy as np

from dpo_jax.config.command_line import parse
from dpo_jax.config.settings import Settings, read_settings
from dpo_jax.errors import UserError
from dpo_jax.model.forward import ModelOptions, hidden_states, unembedding
from dpo_jax.model.placement import Layout, axis_rules, place_model
from dpo_jax.objective.logps import group_logps
from dpo_jax.objective.policy_logps import logp_options, logps_fn
from dpo_jax.objective.token_logps import LogpOptions
from dpo_jax.parallel.mesh import make_mesh, to_global
from dpo_jax.rows.batch import Batch
from dpo_jax.rows.build import GroupSource, build_rows
from dpo_jax.rows.schedule import Schedule, make_schedule
from dpo_jax.rows.shape import RowShape
from dpo_jax.training import inputs
from dpo_jax.training.reference import read_reference
from dpo_jax.training.setup import make_objective, make_optimizer, start_state
from dpo_jax.training.step import LogpsFn, make_logps_step, make_train_step
from dpo_jax.weights.find import Policy, find_policy
from dpo_jax.weights.load import load_params

# A batch that says itself which tokens are predicted by the hidden states at `source`, `[B, N]` each.
Targeted = collections.namedtuple(
    "Targeted", (*Batch._fields, "target_tokens", "target_segments"), defaults=(None,) * 5
)
Rows = Any  # a Batch or Targeted
WHOLE = 10**9  # tokens: more than there are, so one chunk
AGREE = {"chosen_logp": 1e-4, "rejected_logp": 1e-4, "grad_norm": 1e-3}  # relative


@dataclasses.dataclass(frozen=True)
class Unshared:
    """The same pairs with no prompt to share: each completion has its own before it."""

    pairs: GroupSource

    @property
    def lengths(self) -> np.ndarray:
        prompt, chosen, rejected = np.asarray(self.pairs.lengths).T
        return np.stack([0 * prompt, prompt + chosen, prompt + rejected], axis=1)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        prompt, chosen, rejected = self.pairs[i]
        return prompt[:0], np.concatenate([prompt, chosen]), np.concatenate([prompt, rejected])


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to lay out a step and to compute it.

    Attributes:
      rows: step → the batch's arrays `[rows, ...]` and the widths of its rows.
      logps: the model over such rows.
      cached: whether the reference's log-probabilities come with the batch.
      parts: microbatches.
    """

    rows: Callable[[int], tuple[Rows, RowShape]]
    logps: LogpsFn
    cached: bool = False
    parts: int = 1


def projected(layout: Layout, targets: RowShape, options: LogpOptions) -> LogpsFn:
    """The model over rows that say themselves which hidden states are projected, and for which tokens.

    `target_tokens` and `target_segments` `[B, N]` are what `group_logps` otherwise takes from the row, `targets` the
    widths of their two slots.
    """
    rules = axis_rules(layout.config, layout.mesh)

    def logps(params: Any, micro: Rows, shape: RowShape) -> Any:
        with nn.logical_axis_rules(rules):
            model = ModelOptions(layout.config, layout.dtype, "dots", layout.tiling)
            hidden, _ = hidden_states(params, micro, shape, model)
            asked = micro._replace(tokens=micro.target_tokens, segments=micro.target_segments)
            return group_logps(hidden, asked, unembedding(params), targets, options=options)

    return logps


def with_targets(rows: Rows, shape: RowShape) -> Rows:
    """Rows whose targets are those of the product: the completion slots' tokens."""
    targets = {f"target_{name}": getattr(rows, name)[:, shape.prompt :] for name in ("tokens", "segments")}
    return Targeted(*rows, **targets)


def all_tokens(rows: Rows, shape: RowShape) -> Rows:
    """The prompts' hidden states are projected too, into log-probabilities that belong to no pair."""
    rows = with_targets(rows, shape)
    prompt = np.broadcast_to(np.arange(shape.prompt, dtype=np.int32), (len(rows.tokens), shape.prompt))
    added = {"source": prompt, "target_tokens": 0 * prompt, "target_segments": 0 * prompt}
    return rows._replace(**{name: np.concatenate([getattr(rows, name), x], axis=1) for name, x in added.items()})


def unshared_rows(plan: Schedule, placed: np.ndarray, target: RowShape, widths: np.ndarray) -> tuple[Rows, RowShape]:
    """Rows `[ prompt chosen ... | prompt rejected ... ]` of the pairs in `placed`; targets in slots as `target` has."""
    pairs = Unshared(plan.groups)
    shape = RowShape(0, (int(widths[0]), int(widths[1])), len(placed), placed.shape[1])
    rows = build_rows(pairs, placed, shape)
    names = ("source", "target_tokens", "target_segments")
    out = {name: np.zeros((len(placed), target.targets), np.int32) for name in names}
    for b, row in enumerate(placed):
        at, used = [0, shape.completions[0]], [0, target.completions[0]]
        for k in np.flatnonzero(row >= 0):
            lengths, whole = plan.lengths[row[k]], pairs.lengths[row[k]]
            for slot in (0, 1):
                n, end = int(lengths[slot + 1]), at[slot] + int(whole[slot + 1])
                place = slice(used[slot], used[slot] + n)
                out["source"][b, place] = np.arange(end - n - 1, end - 1)
                out["target_tokens"][b, place] = rows.tokens[b, end - n : end]
                out["target_segments"][b, place] = k + 1
                at[slot], used[slot] = end, place.stop
    return Targeted(*rows._replace(source=out.pop("source")), **out), shape


def variants(plan: Schedule, steps: list[int], layout: Layout) -> dict[str, Variant]:
    """The full step, and the step without each of its parts; all over the same `steps`, which have one shape."""
    shape = plan.place(steps[0])[0]

    def shared(step: int, finish: Callable[[Rows, RowShape], Rows] = lambda rows, _: rows) -> tuple[Rows, RowShape]:
        return finish(build_rows(plan.groups, plan.place(step)[1], shape), shape), shape

    sums = [
        Unshared(plan.groups).lengths[np.maximum(placed, 0)] * (placed >= 0)[..., None]
        for placed in (plan.place(step)[1] for step in steps)
    ]
    widths = -(-np.max([x.sum(1).max(0) for x in sums], axis=0) // 8) * 8

    pairs = {step: placed[placed >= 0] for step, placed in ((step, plan.place(step)[1]) for step in steps)}
    longest = -(-np.max([plan.lengths[ids].max(0) for ids in pairs.values()], axis=0) // 8) * 8

    def one_a_row(step: int) -> tuple[Rows, RowShape]:
        ids = pairs[step]
        prompt, *completions = map(int, longest)
        alone = RowShape(prompt, tuple(completions), len(ids))
        return build_rows(plan.groups, ids[:, None], alone), alone

    first, second = shape.completions
    completions, tokens = RowShape(0, (first, second)), RowShape(0, (first, second + shape.prompt))
    ours = logps_fn(layout, remat="dots")
    options = logp_options(layout)
    whole = dataclasses.replace(options, chunk_tokens=WHOLE, block=None)
    return {
        "full": Variant(shared, ours),
        "no sharing": Variant(
            lambda step: unshared_rows(plan, plan.place(step)[1], shape, widths[1:]),
            projected(layout, completions, options),
        ),
        "no packing": Variant(one_a_row, ours, parts=max(1, plan.batch_size // 4)),
        "no skipping": Variant(shared, logps_fn(dataclasses.replace(layout, tiling=None), remat="dots")),
        "whole logits": Variant(lambda step: shared(step, all_tokens), projected(layout, tokens, whole)),
        "no chunks": Variant(lambda step: shared(step, with_targets), projected(layout, completions, whole)),
        "cached reference": Variant(shared, ours, cached=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", required=True, type=int)
    parser.add_argument("flags", nargs="+")
    a = parser.parse_args()
    try:
        config, workdir, _ = parse(["dpo_jax.train", *a.flags])
        s = read_settings(config)
        mesh = make_mesh(*s.mesh)
        policy = find_policy(s.model, workdir, s.seed)
        layout = place_model(policy.config, mesh, s.layout, s.lora)
        with jax.set_mesh(mesh):
            pairs = inputs.prepare_pairs(s, policy.tokenizer, workdir, None).train
            plan = make_schedule(pairs, s.batch.size, layout.row_limits(s.batch.microbatches), s.batch.order)
            steps = [i for i in range(plan.steps_per_epoch) if plan.place(i)[0] == plan.shapes[0]][: a.steps]
            measure(s, policy, layout, plan, steps, a.out)
    except UserError as e:
        parser.error(str(e))


def variant_batch(rows: Rows, parts: int, layout: Layout) -> dict[str, jax.Array]:
    """Rows as the step takes them: `[parts, rows, ...]`."""
    n = len(rows.tokens) // parts
    return to_global(jax.tree.map(lambda x: x.reshape(parts, n, *x.shape[1:]), rows), layout.mesh, n)


def measure(s: Settings, policy: Policy, layout: Layout, plan: Schedule, steps: list[int], file: Path) -> None:
    """Seconds of every variant at every step, XLA's temporaries, and real tokens of computed ones; kept in `file`."""
    tx, rate = make_optimizer(s.optimizer, len(steps))
    objective = make_objective(s.objective)
    fresh = lambda: start_state(load_params(policy, layout, s.seed), tx, layout)
    reference = read_reference(policy.files, layout, moves=False)
    state = fresh()
    runs: dict[str, list[Callable[[Any], Any]]] = {}
    out: dict[str, Any] = {}
    first: dict[str, dict[str, float]] = {}
    began, load = time.strftime("%Y-%m-%d %H:%M"), [os.getloadavg()[0]]
    for name, variant in variants(plan, steps, layout).items():
        step = make_train_step(variant.logps, objective, tx, rate, compute_dtype=layout.dtype)
        given = make_logps_step(variant.logps, compute_dtype=layout.dtype)
        compiled: dict[RowShape, Any] = {}
        runs[name], fill = [], []
        for number in steps:
            rows, shape = variant.rows(number)
            batch = variant_batch(rows, variant.parts, layout)
            if variant.cached:
                batch = batch._replace(ref_logps=given(reference, batch, shape)[0])
            held = None if variant.cached else reference
            if shape not in compiled:
                compiled[shape] = step.lower(state, held, batch, shape).compile()
            run = compiled[shape]
            runs[name].append(lambda s, run=run, held=held, batch=batch: jax.block_until_ready(run(s, held, batch)))
            fill.append(float((rows.segments != 0).mean()))
        _, metrics = runs[name][0](fresh())
        first[name] = {key: float(metrics[key]) for key in AGREE}
        bytes_of = [x.memory_analysis().temp_size_in_bytes for x in compiled.values()]
        out[name] = {"seconds": [], "temporary_gb": max(bytes_of) / 1e9, "fill": float(np.mean(fill))}
        print(f"ablation: {name} compiled, {out[name]['temporary_gb']:.2f} GB, {first[name]}", flush=True)
    for name, values in first.items():
        for key, tolerance in AGREE.items():
            assert abs(values[key] / first["full"][key] - 1) < tolerance, f"{name} does not compute the same: {first}"
    for i in range(len(steps)):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            state, _ = runs[name][i](state)
            out[name]["seconds"].append(time.perf_counter() - start)
            print(f"ablation: {name} step {i + 1}: {out[name]['seconds'][-1]:.1f} s", flush=True)
        found_so_far = {"began": began, "load": [*load, os.getloadavg()[0]], "variants": out, "first": first}
        file.write_text(json.dumps(found_so_far, indent=1))


if __name__ == "__main__":
    sys.exit(main())
