#!/usr/bin/env python3
"""A stand-in for gcloud in the tests of launch_tpu.sh: records calls, replays states, runs for real what goes over ssh.

$FAKE_CLOUD holds `world.json` (what happens, see `launching.py`), `calls.jsonl` (every argv) and a directory for each
worker, which is its home. It answers as gcloud does where the launcher could notice: a command is divided and joined at
spaces, what failed on one of several workers gives that one's exit code, a command may come again after its connection
broke.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from world import CLOUD, world

DEAD = ("SUSPENDING", "SUSPENDED", "FAILED", "PREEMPTED", "TERMINATED", "STOPPED")


def refuse(message, code=1):
    print(message, file=sys.stderr)
    sys.exit(code)


def next_state(states):
    """The first of a list; the last one stays."""
    return states.pop(0) if len(states) > 1 else states[0]


def option(argv, name, default=None):
    return next((word.split("=", 1)[1] for word in argv if word.startswith(f"--{name}=")), default)


def silent(verb):
    """Whoever is asked never answers: neither this process nor the one below it, as gcloud's ssh, ends by itself."""
    with world() as w:
        if verb not in w["silent"]:
            return
    subprocess.run(["sleep", "1000"], check=False)


def queued_resources(verb, argv):
    silent(verb)
    with world() as w:
        current = w["current"]
        if verb == "describe" and w["deaf"]:
            w["deaf"] -= 1
            refuse("ERROR: gcloud crashed (TransportError): HTTPSConnectionPool: Max retries exceeded")
        if verb == "create":
            if current is not None:
                refuse("ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: it exists")
            new = w["slices"].pop(0)
            if "refuse" in new:
                refuse("ERROR: (gcloud.compute.tpus.queued-resources.create) " + new["refuse"])
            w["current"] = new | {"type": option(argv, "accelerator-type")}
        elif current is None:
            refuse(f"ERROR: (gcloud.compute.tpus.queued-resources.{verb}) NOT_FOUND: Resource 'x' was not found")
        elif verb == "describe":
            print("|".join((next_state(current["request"]), current["type"], current.get("error", ""))))
        elif verb == "delete":
            w["current"] = None
            for home in CLOUD.glob("worker-*"):
                switch_off(home)


def switch_off(home):
    """The machine and its disk are no more."""
    for file in home.glob(".dpo_jax/runs/*/pid"):
        for name in ("main", "pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((file.parent / name).read_text()), signal.SIGKILL)
    shutil.rmtree(home, ignore_errors=True)


def node_state(pop):
    with world() as w:
        current = w["current"]
        if current is None or (current["request"][0] in DEAD and "node" not in current):
            refuse("ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource 'x' was not found")
        states = current.setdefault("node", ["READY"])
        return next_state(states) if pop else states[0]


def homes(argv):
    with world() as w:
        count = w["workers"]
    chosen = option(argv, "worker", "0")
    for number in range(count) if chosen == "all" else [int(chosen)]:
        home = CLOUD / f"worker-{number}"
        home.mkdir(exist_ok=True)
        yield number, home


def reachable():
    state = node_state(pop=False)
    if state in DEAD:
        refuse(f"ERROR: (gcloud.compute.tpus.tpu-vm.ssh) This TPU has state {state} and cannot be used", 1)


def ssh(argv):
    reachable()
    command = " ".join(option(argv, "command").split(" "))
    words = command.split()
    verb = words[2] if words[0] == "bash" else words[0]
    silent(verb)
    with world() as w:
        if verb in w["said"]:
            sys.stdout.buffer.write(w["said"][verb].encode("utf-8", "surrogateescape"))
            sys.exit()
    fault = {}
    with world() as w:
        for candidate in w["faults"]:
            if candidate["verb"] == verb:
                fault = candidate
                w["faults"].remove(candidate)
                w["current"].update(fault.get("change", {}))
                break
    codes = []
    for number, home in homes(argv):
        print(f"SSH: Attempting to connect to worker {number}...", file=sys.stderr)
        process = run(command, number, home)
        if "cut_after" in fault:
            sys.stdout.buffer.write(process.stdout.read(fault["cut_after"]))
            sys.stdout.buffer.flush()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not fault["again"]:
                refuse("ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].")
            print("Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].", file=sys.stderr)
            process = run(command, number, home)
        while chunk := process.stdout.read1():
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
        codes.append(process.wait())
    sys.exit(next((code for code in codes if code), 0))


def run(command, number, home):
    """What sshd does: the command to a shell in the home directory, in a session of its own."""
    environment = {
        "HOME": str(home),
        "PATH": f"{CLOUD / 'tools'}:/usr/bin:/bin",
        "FAKE_CLOUD": str(CLOUD),
        "FAKE_WORKER": str(number),
        "TMUX_TMPDIR": str(home),
        "TERM": "dumb",
        "LANG": "C.UTF-8",
    }
    return subprocess.Popen(
        ["bash", "-c", command], cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def scp(argv):
    reachable()
    *sources, target = [word for word in argv if not word.startswith("--")]
    for _, home in homes(argv):
        place = home / target.split(":", 1)[1]
        for source in sources:
            if "--scp-flag=-p" in argv:
                shutil.copy2(source, place)
            else:
                shutil.copyfile(source, place / Path(source).name)


def main(argv):
    with open(CLOUD / "calls.jsonl", "a") as file:
        file.write(json.dumps(argv) + "\n")
    assert argv[:2] == ["compute", "tpus"], argv
    kind, verb, *rest = argv[2:]
    if kind == "queued-resources":
        queued_resources(verb, rest)
    elif verb == "describe":
        silent("describe-node")
        print(node_state(pop=True))
    else:
        rest = rest[1:] if verb == "ssh" else rest
        {"ssh": ssh, "scp": scp}[verb](rest)


if __name__ == "__main__":
    main(sys.argv[1:])
