"""`python -m dpo_jax.train` with task=rl, stopped at a gate before every rollout: dpo_jax's part of `rl.py`.

Everything is the product's; only where a rollout begins is wrapped. The prompts are written to --prompts-file first.

    python -m benchmarks.rl_own_worker --gate IN,OUT --prompts-file FILE -- --config=... --workdir=... [FLAGS]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.gate import Gate
from dpo_jax import train
from dpo_jax.model.config import Params
from dpo_jax.rl.rollouts import Rollout, Rollouts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gate", required=True)
    parser.add_argument("--prompts-file", required=True, type=Path)
    parser.add_argument("flags", nargs="+")
    a = parser.parse_args()
    gate, rollout, facts = Gate(a.gate), Rollouts.rollout, {}

    def gated(self: Rollouts, number: int, params: Params) -> Rollout:
        if number == 0:
            blocks = [self.prompts.block(i, self.count) for i in range(self.count)]
            lines = [{"prompt": list(asked.comparison.prompt_conversation)} for block in blocks for asked, _ in block]
            a.prompts_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        jax.block_until_ready(params)
        gate.boundary(**facts)
        found = rollout(self, number, params)
        tokens: Any = found.lengths[:, 1:].sum()
        facts.update(tokens=int(tokens), sampling=found.facts["sampling_seconds"])
        facts["scoring"] = found.facts["judging_seconds"]
        return found

    Rollouts.rollout = gated  # type: ignore[method-assign]
    return train.main(["dpo_jax.train", *a.flags])


if __name__ == "__main__":
    sys.exit(main())
