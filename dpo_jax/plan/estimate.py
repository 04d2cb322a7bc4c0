"""What a run needs and could do at best on a topology: its own programs, compiled and counted."""

import dataclasses
from typing import Any

from dpo_jax.model.tuning import passes
from dpo_jax.plan.bounds import bounds, by_kind, where_it_runs
from dpo_jax.plan.compile import TooLargeError, eval_program, held_by, train_program
from dpo_jax.plan.draft import Draft
from dpo_jax.plan.lengths import Lengths
from dpo_jax.rows.schedule import efficiency

PAIR_SLOTS = ("prompt", "chosen", "rejected")


def estimate(draft: Draft, lengths: Lengths) -> dict[str, Any]:
    """Compile for one topology and report; see `report_lines` for what the keys mean."""
    s, topology, layout = draft.settings, draft.topology, draft.layout
    report: dict[str, Any] = {
        **where_it_runs(topology, layout.mesh),
        "batch_size": s.batch.size,
        "unit": "prompts" if s.task == "rl" else "pairs",
        "microbatches": s.batch.microbatches,
        "rows": [
            {
                "rows": shape.rows,
                **(dict(zip(PAIR_SLOTS, shape.widths, strict=True)) if shape.n == 2 else {}),
                "pairs": shape.places,
                "widths": shape.widths,
                "share": share,
                "attention": "splash" if layout.uses_kernel(shape) else "dense",
            }
            for shape, share in draft.shares.items()
        ],
        "useful_token_fraction": efficiency(draft.schedule.epoch(0), lengths.lengths),
        "compute_dtype": str(layout.dtype),
        "remat": s.remat,
        "hbm_available": topology.generation.hbm_bytes,
    }
    held = held_by(draft)
    try:
        measured = _measured(draft, lengths)
    except TooLargeError as e:
        return report | {"fits": False, "why": str(e), "memory": held}
    needed = measured["memory"]
    needed["activations"] = needed["total"] - sum(held.values())
    return report | measured | {"memory": held | needed}


def _measured(draft: Draft, lengths: Lengths) -> dict[str, Any]:
    s, layout, topology = draft.settings, draft.layout, draft.topology
    shapes, main = draft.shares, draft.main_shape
    train = train_program(draft, main)
    widest = train if draft.widest_shape == main else train_program(draft, draft.widest_shape)
    evaluation = eval_program(draft, main)
    devices, precision = list(layout.mesh.devices.flat), passes(layout.dtype, layout.platform)
    at_best, evaluation_at_best = (bounds(p.costs, topology, devices, passes=precision) for p in (train, evaluation))
    inside, between = by_kind(train.costs, devices)
    # Steps with rows of other shapes take time in proportion to their tokens.
    scale = sum(share * shape.tokens for shape, share in shapes.items()) / main.tokens
    seconds = at_best.step * scale
    speed, evaluation_speed = s.batch.size / seconds, s.batch.size / (evaluation_at_best.step * scale)
    epochs = s.num_steps * s.batch.size / lengths.pairs if s.num_steps else s.num_epochs
    hours = epochs * lengths.pairs / speed / 3600
    if draft.objective.needs_reference and s.reference.cache:
        hours += min(epochs, 1) * lengths.pairs / evaluation_speed / 3600
    a_token = layout.config.active_parameter_count()
    real = a_token * float(draft.schedule.lengths[draft.schedule.members(0)].sum(1).mean()) * s.batch.size
    needed = least_operations(draft)
    peak = topology.generation.peak_flops * len(devices)
    flops = (train.costs.flops + train.costs.kernel_flops) * len(devices) * scale
    return {
        "fits": True,
        "memory": {
            "total": train.total_bytes,
            "host": train.host_bytes,
            "largest_shape_total": widest.total_bytes,
        },
        "headroom": topology.generation.hbm_bytes - max(train.total_bytes, widest.total_bytes),
        "evaluation_memory": evaluation.total_bytes,
        "flops": flops,
        "flops_per_8N": flops / (8 * real),
        "needed_per_parameter_and_token": needed,
        "hbm_bytes": train.costs.hbm_bytes * scale,
        "interconnect_bytes": {kind: n * scale for kind, n in inside.items()},
        "network_bytes": {kind: n * scale for kind, n in between.items()},
        "kernels": train.costs.kernels,
        "not_counted": [*train.costs.unknown_kernels, *train.costs.unknown_loops],
        "seconds": {name: time * scale for name, time in dataclasses.asdict(at_best).items()},
        "binds": at_best.binding,
        "pairs_per_second": speed,
        "pairs_per_second_per_chip": speed / topology.chips,
        "share_of_peak": {
            "at_the_bound": needed * real / (peak * seconds),
            "if_compute_bound": needed * real / (peak * at_best.compute * scale),
        },
        "evaluation_pairs_per_second": evaluation_speed,
        "epochs": epochs,
        "hours": hours,
        "compile_seconds": {"train": train.seconds, "evaluation": evaluation.seconds},
    }


def least_operations(draft: Draft) -> int:
    """What a step needs at least for each parameter that a token meets.

    The policy's forward pass 2, its backward pass 2 for gradients of activations and, unless they are frozen, 2 for
    those of parameters; the reference's forward pass 2 if the step has one.
    """
    in_step = draft.objective.needs_reference and not draft.settings.reference.cache
    return (6 if draft.layout.lora is None else 4) + (2 if in_step else 0)
