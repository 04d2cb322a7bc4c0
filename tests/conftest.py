"""Strict numbers and eight CPU devices for every test."""

import atexit
import gc
import os
import shutil
import tempfile
from importlib import metadata

# Before jax is imported anywhere. Programs are compiled once for all tests, and for the processes that they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dpo_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["JAX_PLATFORMS"] = "cpu"
# Programs need not hold from which lines of code they came. With gc's threshold and the pass that is off below, it is a
# quarter of the tests' time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Compiling is most of what these tests do, and their models are tiny: LLVM optimises nothing, and the older emitters,
# which make the same numbers, take half of the time of the newer ones.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # From 0.12 on there are no others, and a flag that XLA does not know ends the process.
        *(["--xla_cpu_use_fusion_emitters=false"] if metadata.version("jaxlib") < "0.12" else []),
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read when gcsfs is imported; it asks Google's own servers

import jax
import pytest

from tests.fakes.bucket import bucket, bucket_server  # noqa: F401 (fixtures)
from tests.fakes.hub import hub  # noqa: F401 (a fixture)
from tests.fakes.launching import cloud, launch_repo  # noqa: F401 (fixtures)

# Scripts for another environment (torch, TRL), what tests start, and programs that they put in place of real ones.
collect_ignore = ["golden", "preloaded.py", "fakes/gcloud.py", "fakes/trainer.py"]

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(100_000, 20, 20)  # tracing makes objects by the million, and few of them are garbage


@pytest.fixture(autouse=True, scope="session")
def cache_dir(tmp_path_factory):
    """No test reads or leaves tokenised pairs in the user's cache."""
    os.environ["DPO_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


# The files whose slow tests take longest. Begun last, one of them would keep a worker busy when the others are done.
LONGEST = [
    f"tests/{name}.py"
    for name in (
        "end_to_end/test_notebooks",
        "plan/test_command",
        "end_to_end/test_faults",
        "fuzz/test_fuzz",
        "end_to_end/test_train",
        "model/test_families",
        "end_to_end/test_processes",
        "answering/test_processes",
        "training/test_rounds",
        "weights/test_peft",
        "plan/test_compile",
        "training/test_reference",
    )
]


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    """The longest files come first. Of a test that is marked `sweep` the first case is quick, and all others slow."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
    seen = set()
    for item in items:
        if item.get_closest_marker("sweep"):
            name = item.nodeid.partition("[")[0]
            if name in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(name)


def pytest_addoption(parser):
    parser.addoption("--write-docs", action="store_true", help="put what this run measured into the tables of docs/")


@pytest.fixture(scope="session")
def measured(request):
    """`measured("models", "logits", "llama", difference)`: with `--write-docs`, a cell of a table in docs/models.md.

    A document marks its table with `<!-- measured -->` and `<!-- end -->`: the first column names the row, the head
    names the columns. A larger difference of the same run wins; rows and cells that a run did not measure stay. What is
    no difference has a `form` of its own, such as ".3f".
    """
    cells = {}

    def add(document, column, row, value, form=".1e"):
        table = cells.setdefault(document, {})
        _, before = table.get((row, column), (form, 0.0))
        table[row, column] = (form, max(before, float(value)))

    yield add
    if request.config.getoption("--write-docs"):
        for document, table in cells.items():
            _rewrite(request.config.rootpath / "docs" / f"{document}.md", table)


def _rewrite(path, table):
    before, rest = path.read_text().split("<!-- measured -->\n")
    body, after = rest.split("<!-- end -->")
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.strip().split("\n")]
    named = {cells[0].strip("`"): cells for cells in rows}
    for (row, column), (form, value) in table.items():
        if column not in head:
            raise KeyError(f"{path}: the table has no column {column!r}")
        cells = named.setdefault(row, [f"`{row}`", *("–" for _ in head[1:])])
        cells[head.index(column)] = format(value, form)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, rule, *named.values())]
    path.write_text(f"{before}<!-- measured -->\n" + "\n".join(lines) + f"\n<!-- end -->{after}")
