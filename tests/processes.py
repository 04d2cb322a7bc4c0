"""Processes that tests start: several that find each other over loopback, for tests of pods without one."""

import os
import socket

from tests import programs


def of_a_user():
    """The environment without what the tests set for XLA in their own process: a program compiled as a user's is."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def quick_to_compile(devices=1):
    """The environment of a process with so many CPU devices, whose programs are compiled as quickly as the tests' own.

    For runs of which neither speed nor the last bits are compared with anything compiled otherwise.
    """
    # Of a flag that is given twice the last one counts.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags}


def with_devices(count):
    """The environment of a process with so many CPU devices, which finds the tests' own modules."""
    flags = os.environ.get("XLA_FLAGS", "").replace("device_count=8", f"device_count={count}")
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.getcwd()}


def start(commands, environment=None):
    """Start `commands` as the processes 0, 1, ... of one run; returns the processes. Output of both kinds is piped.

    `environment` is that of all, or a list has each one's.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    started = []
    for number, command in enumerate(commands):
        joined = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(len(commands)),
            "JAX_PROCESS_ID": str(number),
        }
        env = (environment[number] if isinstance(environment, list) else environment or os.environ) | joined
        started.append(programs.begin(command, env, stdout=programs.PIPE, stderr=programs.STDOUT))
    return started


def end(started, codes, timeout=300):
    """Wait for all; every one must end with its code. Returns what they printed."""
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == list(codes), "\n---\n".join(printed)
    return printed


def run_all(target, arguments):
    """Call `target` in as many fresh processes as there are tuples of arguments, all at once; all must succeed."""
    context = programs.FORKING
    started = [context.Process(target=target, args=one) for one in arguments]
    for process in started:
        process.start()
    for process in started:
        process.join(300)  # compiling for TPUs takes a minute on a busy machine
    assert {process.exitcode for process in started} == {0}
