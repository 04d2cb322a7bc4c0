"""The commands that an installation puts on the path: `dpo-jax-train` is `python -m dpo_jax.train`, and so on."""

from typing import NoReturn

from dpo_jax.entry import exit_within_a_limit


def train_script() -> NoReturn:
    from dpo_jax.train import main

    exit_within_a_limit(main)


def data_script() -> NoReturn:
    from dpo_jax.inspection.command import main

    exit_within_a_limit(main)


def plan_script() -> NoReturn:
    from dpo_jax.plan.command import main

    exit_within_a_limit(main)


def report_script() -> NoReturn:
    from dpo_jax.report.command import main

    exit_within_a_limit(main)


def sample_script() -> NoReturn:
    from dpo_jax.sample import main

    exit_within_a_limit(main)


def judge_script() -> NoReturn:
    from dpo_jax.judge import main

    exit_within_a_limit(main)


def collect_script() -> NoReturn:
    from dpo_jax.collect import main

    exit_within_a_limit(main)


def rlhf_script() -> NoReturn:
    from dpo_jax.rlhf import main

    exit_within_a_limit(main)
