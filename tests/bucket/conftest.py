import pytest

from dpo_jax.bucket import client
from tests.fakes.bucket import emulated


def forget_client():
    """Let the next request make a client anew, of the environment as it then is."""
    if client.google_client.cache_info().currsize:
        client.google_client().close()
    client.google_client.cache_clear()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The emulator, once for all tests here."""
    with emulated(tmp_path_factory.mktemp("bucket")) as bucket:
        yield bucket


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """The emulated bucket without faults, as this process sees it."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    server.calm()
    server.asked.clear()
    forget_client()
    yield server
    server.calm()
    forget_client()
