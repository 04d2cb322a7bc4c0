"""`dpo_jax.run` with one key of another value, as a program of a user: `python -m tests.fuzz.called KEY HOW WORKDIR`.

A UserError is what a user's program gets, and is printed here in one line as the command does; any other is a bug.
"""

import sys

import dpo_jax
from tests import places
from tests.fuzz.cases import SMALL
from tests.fuzz.config_values import BRIEF, VALUES


def main(argv: list[str] | None = None) -> int:
    key, how, workdir = (sys.argv if argv is None else argv)[1:]
    config = dict(dpo_jax.get_config(f"{places.ROOT / 'configs/hhh.py'}:tiny")) | SMALL | BRIEF
    try:
        dpo_jax.run(config | {key: VALUES[how]}, workdir)
    except dpo_jax.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
