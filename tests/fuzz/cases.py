"""What a case is, and the place that it has for itself."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests import places

TINY = places.ROOT / "tests/golden/trl/tiny"
PAIRS = places.ROOT / "tests/golden/trl/pairs.jsonl"

# A run of the smallest model that passes through all that a run has: SFT, DPO, evaluations, answers, an export.
SMALL = {
    "model": str(TINY),
    "dataset": str(PAIRS),
    "eval_pairs": 8,
    "max_prompt_length": 64,
    "max_completion_length": 32,
    "batch_size": 4,
    "sft_steps": 2,
    "num_steps": 4,
    "eval_every": 2,
    "checkpoint_every": 2,
    "log_every": 1,
    "sample_prompts": 1,
    "sample_tokens": 4,
    "kl_prompts": 2,
    "judge": "",
    "attention": "dense",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """A case's own directory: only `work` and `cache` (and `tmp`, while it runs) may be written by what is tested.

    `home` is the user's, `given` holds the hostile input. A file that hostile code makes is `canary`.
    """

    root: Path

    home = property(lambda self: self.root / "home")
    given = property(lambda self: self.root / "given")
    work = property(lambda self: self.root / "work")
    cache = property(lambda self: self.root / "cache")
    tmp = property(lambda self: self.root / "tmp")
    canary = property(lambda self: self.root / "canary")

    def make(self) -> None:
        for directory in (self.home, self.given, self.work, self.cache, self.tmp):
            directory.mkdir(parents=True)
        (self.home / ".profile").write_text("# of the user\n")

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        """The variables by which a process finds it."""
        return {
            "HOME": str(self.home),
            "TMPDIR": str(self.tmp),
            "DPO_JAX_CACHE": str(self.cache),
            "XDG_CACHE_HOME": str(self.cache / "xdg"),
        }


@dataclasses.dataclass(frozen=True)
class Command:
    """What is started: a door of the package by its module, with arguments, or (of the launcher) words of its own."""

    module: str
    arguments: list[str | bytes]
    stdin: bytes = b""


@dataclasses.dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
      name: KIND/WHAT/HOW: it says all, so the name alone brings the case back.
      prepare: makes the input in a place and says what to start.
      says: a pattern that the output must hold; empty: it may be silent. It is for damage that must not be believed.
      codes: exit codes that are right for it; empty: all that docs/faults.md has, but not 1.
      writes: it names where to write, which may then be anywhere.
    """

    name: str
    prepare: Callable[[Place], Command]
    says: str = ""
    codes: tuple[int, ...] = ()
    writes: bool = False

    @property
    def kind(self) -> str:
        return self.name.split("/")[0]


def train(place: Place, workdir: str = "", **changed: object) -> Command:
    """`python -m dpo_jax.train` on the smallest run, with some keys changed; in the place if no directory is given."""
    keys = [f"--config.{key}={value}" for key, value in (SMALL | changed).items()]
    preset = f"--config={places.ROOT / 'configs/hhh.py'}:tiny"
    return Command("dpo_jax.train", [preset, f"--workdir={workdir or place.work / 'run'}", *keys])


def data(verb: str, place: Place, **changed: object) -> Command:
    """`python -m dpo_jax.data`, on the pairs of the smallest run."""
    keys = [f"--config.{key}={value}" for key, value in (SMALL | changed).items()]
    return Command("dpo_jax.data", [verb, f"--config={places.ROOT / 'configs/hhh.py'}:tiny", *keys])


def sample(place: Place, model: str | os.PathLike[str], *further: str) -> Command:
    """`python -m dpo_jax.sample`, of one short answer."""
    asked = ["--limit=1", "--max_tokens=2", "--temperature=0", f"--out={place.work / 'answers.jsonl'}"]
    return Command("dpo_jax.sample", [f"--model={model}", f"--prompts={PAIRS}", *asked, *further])
