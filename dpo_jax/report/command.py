"""A run's page, `report.html`, and the command line for it.

`python -m dpo_jax.report DIR` writes DIR/report.html again; with several directories it writes compare.html. Both read
only the files in a run's directory, and leave out the parts whose files are missing. No JAX is needed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dpo_jax.bucket.path import as_path
from dpo_jax.entry import EntryPoint, run_entry_point
from dpo_jax.report.compare import compare_page
from dpo_jax.report.html import write_page
from dpo_jax.report.page import run_page
from dpo_jax.report.runs import load_run


def write_report(workdir: Path, out: Path | None = None) -> Path:
    """Write the run's page, WORKDIR/report.html unless `out` is given, and return its path."""
    path, values = out or workdir / "report.html", run_page(load_run(workdir))
    return write_page(path, "report/templates/run.html", option="--out", **values)


def write_comparison(workdirs: Sequence[Path], out: Path) -> Path:
    """Write one page for several runs: differences of their configs, final numbers, curves over one another."""
    values = compare_page([load_run(workdir) for workdir in workdirs])
    return write_page(out, "report/templates/compare.html", option="--out", **values)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 2 for what the user can mend, 74 where the disk is full."""
    parser = argparse.ArgumentParser(prog="python -m dpo_jax.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("workdirs", nargs="+", metavar="DIR", help="a run's --workdir, gs:// too; several are compared")
    parser.add_argument("--out", help="the page to write (default: DIR/report.html, or ./compare.html)")

    def write(entry: EntryPoint) -> None:
        entry.afterwards = "the same command begins anew"
        options = parser.parse_args(arguments)
        workdirs, out = [as_path(one) for one in options.workdirs], as_path(options.out) if options.out else None
        if len(workdirs) > 1:
            path = write_comparison(workdirs, out or Path("compare.html"))
        else:
            path = write_report(workdirs[0], out)
        print(path)

    return run_entry_point(write)
