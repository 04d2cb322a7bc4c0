"""Strict numbers and eight CPU devices for every test."""

import os

# Before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

collect_ignore = ["golden"]  # scripts for another environment (torch, TRL)

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def cache_dir(tmp_path_factory):
    """No test reads or leaves tokenised pairs in the user's cache."""
    os.environ["DPO_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
