"""What pip installs: the package with its data files, and the configs as data, not as a package of that name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A wheel of the working tree, installed below a directory of its own; returns how to run its Python elsewhere."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    for name in ("dpo_jax", "configs"):
        shutil.copytree(name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    prefix = work / "prefix"
    subprocess.run([*pip, "--ignore-installed", f"--prefix={prefix}", str(source)], check=True)
    (site,) = prefix.glob("l*/python*/site-packages")
    elsewhere = work / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*args):
        return subprocess.run(
            [sys.executable, *args], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
        )

    assert str(site) in run("-c", "import dpo_jax; print(dpo_jax.__file__)").stdout
    return run, site


def test_every_file_of_the_package_is_installed(installed):
    _, site = installed
    here = {p.relative_to("dpo_jax") for p in Path("dpo_jax").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    there = {p.relative_to(site / "dpo_jax") for p in (site / "dpo_jax").rglob("*") if p.is_file()}
    assert here - there == set()


def test_configs_are_data_and_no_package(installed):
    run, site = installed
    assert [p.name for p in site.iterdir() if p.suffix != ".dist-info"] == ["dpo_jax"]
    out = run("-c", "import dpo_jax; print(dpo_jax.get_config('configs/hhh.py:tiny').model)")
    assert out.stdout == "tiny\n", out.stderr


@pytest.mark.parametrize("command", ["train", "plan", "data", "report", "sample", "judge", "collect", "rlhf"])
def test_commands_run_from_everywhere(installed, command):
    run, site = installed
    done, script = (
        run("-m", f"dpo_jax.{command}", "--help"),
        run(site.parents[2] / "bin" / f"dpo-jax-{command}", "--help"),
    )
    assert (done.returncode, script.returncode) == (0, 0), done.stderr + script.stderr
    assert f"python -m dpo_jax.{command}" in done.stdout == script.stdout


def test_a_missing_config_is_said_with_those_that_are_installed(installed):
    run, _ = installed
    done = run("-m", "dpo_jax.train", "--config=configs/none.py", "--workdir=run")
    assert done.returncode == 2
    presets = sorted({path.name for path in Path("configs").glob("*.py")} - {"__init__.py", "common.py"})
    names = ", ".join(f"configs/{name}" for name in presets)
    assert f"no such file; there are {names}" in done.stderr
