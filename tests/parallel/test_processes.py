"""How the processes of a run find each other: what cannot work is one line, and nobody waits for ever."""

import socket
import subprocess
import sys
import time

import pytest

from dpo_jax.errors import UserError
from dpo_jax.parallel import processes
from dpo_jax.parallel.address import answers, host_and_port, try_to_listen

JOIN = """
import sys
from dpo_jax.entry import run_entry_point
from dpo_jax.parallel import processes
processes.JOIN_SECONDS, processes.SILENT_SECONDS = 3.0, 1.0
sys.exit(run_entry_point(lambda entry: processes.join(*sys.argv[1:])))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("10.0.0.2", ("10.0.0.2", None)),
        ("host-1.example:80", ("host-1.example", 80)),
        ("[::1]:8476", ("::1", 8476)),
        ("[fe80::1]", ("fe80::1", None)),
    ],
)
def test_addresses(text, parts):
    assert host_and_port("bind", text) == parts


@pytest.mark.parametrize(
    "text",
    ["", "a b", "host:", "host:0", "host:65536", "host:１２", "::1", "[::1", "$(id)", "a\n", ":80", "h:80:80", "-h"],
)
def test_what_is_no_address(text):
    with pytest.raises(UserError, match="is no address; HOST:PORT is needed"):
        host_and_port("bind", text)


def test_an_address_of_another_machine_and_a_port_that_is_taken():
    with pytest.raises(UserError, match=r"cannot listen there .*; give an address of the first process's own machine"):
        try_to_listen("203.0.113.7", free_port())
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert answers("127.0.0.1", port)
        with pytest.raises(UserError, match=r"already in use.*; end the process that has it"):
            try_to_listen("", port)
    assert not answers("127.0.0.1", port)


NUMBERS = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:23456", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


@pytest.mark.parametrize(
    ("changed", "bind", "told"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1"}, "", "JAX_COORDINATOR_ADDRESS=127.0.0.1 has no port"),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:x"}, "", "is no address"),
        ({"JAX_NUM_PROCESSES": "two"}, "", "the other processes are not known"),
        ({"JAX_PROCESS_ID": "2"}, "", "JAX_PROCESS_ID=2 is not one of JAX_NUM_PROCESSES=2"),
        ({"JAX_PROCESS_ID": ""}, "", "the other processes are not known"),
        ({}, "203.0.113.7", "coordinator_bind=203.0.113.7, port 23456: the first process cannot listen there"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "127.0.0.1", "a port is needed"),
        ({"JAX_COORDINATOR_BIND_ADDRESS": "nobody knows"}, "", "is no address"),
    ],
)
def test_what_cannot_join_is_one_line_before_jax_is_asked(changed, bind, told, monkeypatch):
    for name, value in (NUMBERS | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told) as refused:
        processes.join(bind)
    assert "\n" not in str(refused.value)
    assert refused.value.code == 2


@pytest.mark.slow
def test_a_peer_that_never_joins_is_waited_for_with_a_line_and_not_for_ever():
    """JAX would abort with a stack of C++ after five minutes."""
    address = f"127.0.0.1:{free_port()}"
    given = {**NUMBERS, "JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": "1", "PATH": "/usr/bin:/bin"}
    command, began = [sys.executable, "-c", JOIN], time.monotonic()
    done = subprocess.run(command, env=given | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 70, done.stderr
    assert done.stdout == f"process 1 of 2 waits for the others at {address}, 3 s at most\n"
    assert done.stderr == (
        f"error: process 1 of 2 has waited 3 s for the other processes of this run to join at {address}; nothing "
        f"listens at {address}, where process 0 should, so it ends (exit code 70); start all of them within that time, "
        "by the same command\n"
    )
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_the_coordinator_listens_where_it_is_told_to():
    """One process of one: it joins itself; then nothing listens on other addresses of this machine."""
    port = free_port()
    script = """
import os, socket, sys
from dpo_jax.parallel import processes
from dpo_jax.parallel.address import answers
processes.join(sys.argv[1])
port = int(sys.argv[2])
print([answers(host, port) for host in ("127.0.0.1", "127.0.0.2")], flush=True)
os._exit(0)
"""
    given = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    given |= {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    for bind, reached in (("127.0.0.1", "[True, False]"), ("", "[True, True]")):
        command = [sys.executable, "-c", script, bind, str(port)]
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=60)
        assert done.stdout == reached + "\n", done.stderr
