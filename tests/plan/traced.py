"""FLOPs of a run's own step as it was traced: `python -m tests.plan.traced --config=... --topology=...`, as for plan.

Prints a JSON list: for each topology, what `python -m dpo_jax.plan` reports as `flops`, counted in the jaxpr instead. A
process of its own, as libtpu puts handlers on signals.
"""

import json
import sys

from tests import programs
from tests.processes import of_a_user


def traced_flops(*args: str) -> list[float]:
    """Trace in a process of its own, with the arguments of `python -m dpo_jax.plan`."""
    command = [sys.executable, "-m", "tests.plan.traced", *args]
    done = programs.run(command, of_a_user(), capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def kernel_flops(slots, tiling):
    """FLOPs of the step's kernels from their names and operands in a jaxpr."""
    from dpo_jax.model.attention.tpu_splash import Tiling
    from dpo_jax.plan.kernels import attention_flops, query_shape

    def flops(name, operands, results):
        if name == "pallas_call":
            return grouped_flops(operands)
        return attention_flops(name, query_shape(operands), slots, tiling) if isinstance(tiling, Tiling) else None

    return flops


def grouped_flops(operands) -> float | None:
    """Of the nameless kernel for the gradient of experts' weights; its last operands are `[R, I]` and `[R, O]`."""
    x, grad = (operand.shape for operand in operands[-2:])
    return 2.0 * x[0] * x[1] * grad[1] if len(x) == len(grad) == 2 else None


def _flops(s, values, topology_name):
    import jax

    from dpo_jax.model.tuning import exact_products
    from dpo_jax.parallel.tpu import parse_topology, quiet
    from dpo_jax.plan.compile import experts_share, train_step_of
    from dpo_jax.plan.draft import find_model, make_draft
    from dpo_jax.plan.lengths import find_lengths
    from tests.oracles import jaxpr_costs

    model, lengths = find_model(s.model, seed=s.seed), find_lengths(s, values["lengths"])
    draft = make_draft(s, model, lengths, parse_topology(topology_name))
    layout, main = draft.layout, draft.main_shape
    step, arguments = train_step_of(draft, main)
    with jax.set_mesh(layout.mesh), exact_products(layout.dtype, layout.platform), quiet():
        jaxpr = step.trace(*arguments).jaxpr
    formula, share = kernel_flops(main, layout.tiling), experts_share(layout)
    flops = jaxpr_costs.flops(jaxpr, formula, grouped_share=share)
    return flops * sum(part * shape.tokens for shape, part in draft.shares.items()) / main.tokens


def main() -> None:
    import jax

    from dpo_jax.config.command_line import read_flags
    from dpo_jax.config.settings import read_settings
    from dpo_jax.plan.command import COMMAND

    jax.config.update("jax_platforms", "cpu")
    config, values = read_flags(sys.argv, COMMAND)
    settings = read_settings(config)
    print(json.dumps([_flops(settings, values, name) for name in values["topology"].split(",")]))


if __name__ == "__main__":
    main()
