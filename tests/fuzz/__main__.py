"""`python -m tests.fuzz`: cases of every kind in turn, as many as there is time for; exit code 1 if any failed."""

import argparse
import collections
import contextlib
import gc
import importlib
import importlib.util
import itertools
import json
import os
import random
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tests import places
from tests.fuzz.cases import Case, Place
from tests.programs import end_as_a_process

KINDS = ("config", "run", "bucket", "cache", "model", "data", "worker")
_LIKE_A_USERS = {
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    # Programs are compiled as quickly as the tests' own.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1",
    "PYTHONPATH": str(places.ROOT),
}
# What the doors import when they begin to work. None of it starts JAX's threads, so that a fork of it is whole.
_IMPORTED = """
    dpo_jax.train dpo_jax.training.run dpo_jax.rl.phase dpo_jax.report.command dpo_jax.inspection.command
    dpo_jax.inspection.actions dpo_jax.sample dpo_jax.answering.draw tests.fuzz.called
""".split()


def main() -> int:
    options = _options()
    base = options.base or Path(tempfile.mkdtemp(prefix="fuzz"))
    base.mkdir(parents=True, exist_ok=True)
    os.environ.update(_LIKE_A_USERS)
    for name, directory in (("JAX_COMPILATION_CACHE_DIR", "compiled"), ("HF_HOME", "hub"), ("MPLCONFIGDIR", "mpl")):
        os.environ[name] = str(base / directory)
    from tests.fuzz import bases, processes

    bases.BASE = base
    processes.SECONDS = options.seconds or processes.SECONDS
    kinds = [name.split("/")[0] for name in options.case] if options.case else options.kinds.split(",")
    if {"run", "bucket", "cache"} & set(kinds):
        bases.build()
    with contextlib.ExitStack() as until_end:
        if "bucket" in kinds:
            bases.build_in_bucket(until_end)
        return _main(kinds, options, base)


def _main(kinds: list[str], options: argparse.Namespace, base: Path) -> int:
    from tests.fuzz import processes

    found = _cases(kinds, options)
    if options.list:
        print("\n".join(case.name for case in found))
        return 0
    for name in _IMPORTED if set(kinds) - {"worker", "faulty"} else ():
        importlib.import_module(name)
    gc.freeze()  # or the first collection in a fork copies every page
    try:
        return _drive(found, options, base)
    except processes.Child as child:
        command = child.command
    # In a forked process, and outside of the `except`: from here on it is the door's own process.
    sys.argv = [command.module, *command.arguments]
    _be(command.module)
    return 0


def _be(module: str) -> NoReturn:
    """What `python -m MODULE` does, its imports being made."""
    found = importlib.util.find_spec(module)
    if found is not None and found.submodule_search_locations is not None:
        found = importlib.util.find_spec(f"{module}.__main__")
    assert found is not None
    origin = found.origin
    assert origin is not None
    end_as_a_process(lambda: runpy.run_path(origin, run_name="__main__"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="after so long no further case is begun")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which cases are taken")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--case", action="append", help="this case alone, with all that it prints; or its beginning*")
    parser.add_argument("--per-kind", type=int, default=0, help="so many cases of each kind; 0 = all there is time for")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="cases at a time")
    parser.add_argument("--base", type=Path, help="what cases are made of is kept here for the next call")
    parser.add_argument("--out", type=Path, help="a line of JSON a case; cases that are in it are not run again")
    parser.add_argument("--seconds", type=float, help="a case may work, or be idle, for so long (20)")
    parser.add_argument("--fresh", action="store_true", help="a new process a case, in place of a fork of this one")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    return parser.parse_args()


_MODULES = {
    "config": "config_values",
    "run": "run_files",
    "bucket": "bucket_files",
    "cache": "cache_files",
    "model": "model_files",
    "data": "data_files",
    "worker": "worker_answers",
    "faulty": "faulty",  # not of the default: it is there to fail
}


def _cases(kinds: list[str], options: argparse.Namespace) -> list[Case]:
    """The cases that are asked for, in the order of the seed: kinds take turns, and in a kind what is altered."""
    by_kind = {}
    for kind in dict.fromkeys(kinds):
        every = list(importlib.import_module(f"tests.fuzz.{_MODULES[kind]}").cases())
        assert len({case.name for case in every}) == len(every), "two cases have one name"
        if options.case:
            begins = tuple(name[:-1] for name in options.case if name.endswith("*"))
            every = [c for c in every if c.name in options.case or (begins and c.name.startswith(begins))]
        elif not options.list:
            random.Random(f"{options.seed} {kind}").shuffle(every)
            every = _in_turn(every, lambda case: case.name.split("/")[1])[: options.per_kind or None]
        by_kind[kind] = every
    return _in_turn([case for every in by_kind.values() for case in every], lambda case: case.kind)


def _in_turn(cases: list[Case], group: Callable[[Case], str]) -> list[Case]:
    """The first case of every group, then the second of every group, and so on."""
    groups = collections.defaultdict(list)
    for case in cases:
        groups[group(case)].append(case)
    return [case for turn in itertools.zip_longest(*groups.values()) for case in turn if case is not None]


def _drive(cases: list[Case], options: argparse.Namespace, base: Path) -> int:
    from tests.fuzz import processes
    from tests.fuzz.rule import broken

    known = set()
    if options.out and options.out.exists():
        known = {json.loads(line)["case"] for line in options.out.read_text().splitlines()}
    queue = collections.deque(case for case in cases if case.name not in known)
    deadline, begun = time.monotonic() + 60 * options.minutes, time.monotonic()
    running: list[processes.Running] = []
    counts, failed = collections.defaultdict(collections.Counter), []
    while running or (queue and time.monotonic() < deadline):
        while queue and len(running) < options.jobs and time.monotonic() < deadline:
            place = Place(Path(tempfile.mkdtemp(prefix="case", dir=base)) / "p")
            running.append(processes.start(queue.popleft(), place, fresh=options.fresh))
        for one in list(running):
            if (end := processes.ended(one)) is None:
                continue
            running.remove(one)
            fault = broken(one.case, end)
            counts[one.case.kind][fault[0] if fault else "held"] += 1
            if fault:
                failed.append((one.case.name, *fault))
                print(f"FAILED {one.case.name}: {fault[0]}: {fault[1]}", flush=True)
            if options.case:
                print(f"--- {one.case.name}: code {end.code} after {end.seconds:.1f} s, {end.peak / 1e9:.2f} GB")
                print(_visible(end.out[-4000:]), _visible(end.err[-6000:]), sep="\n---\n", flush=True)
            if options.out:
                record = {"case": one.case.name, "fault": fault and fault[0]}
                record |= {"said": fault[1] if fault else end.err[:300]}
                record |= {"code": end.code, "seconds": round(end.seconds, 2), "gb": round(end.peak / 1e9, 2)}
                with options.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            one.place.remove()
            one.place.root.parent.rmdir()
        time.sleep(0.005)
    total = sum(sum(counter.values()) for counter in counts.values())
    print(f"{total} cases in {time.monotonic() - begun:.0f} s, {len(queue)} were not reached (seed {options.seed})")
    for kind, counter in counts.items():
        named = ", ".join(f"{n} {name}" for name, n in counter.most_common())
        print(f"  {kind:8} {sum(counter.values()):5} cases: {named}")
    for name, *_ in failed:
        print(f"  again: python -m tests.fuzz --case={name!r}")
    return 1 if failed else 0


def _visible(text: str) -> str:
    from dpo_jax.records.records import printable

    return printable(text)


if __name__ == "__main__":
    sys.exit(main())
