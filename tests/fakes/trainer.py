"""What stands for `python -m dpo_jax.train` on the fake workers of `fake_gcloud.py`.

It counts steps in its workdir and continues where the last run there stopped. The first of `trainers` in world.json
says what happens: `lines` steps, a `change` of the slice, then `exit` with a code, or `end`: "hang" until a signal,
"killed" with nobody left to write an exit code, "rebooted" with its machine.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from world import CLOUD, world


def main(argv):
    directory = Path(f"{os.environ['HOME']}/.dpo_jax/run").resolve()
    with world() as w:
        plan = w["trainers"].pop(0)
        record = {"argv": argv, "cwd": os.getcwd(), "worker": os.environ["FAKE_WORKER"], "env": dict(os.environ)}
        with open(CLOUD / "trained.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    given = next(word.split("=", 1)[1] for word in argv if word.startswith("--workdir="))
    workdir = Path(given.replace("gs:/", str(CLOUD / "buckets"), 1) if given.startswith("gs://") else given)
    workdir.mkdir(parents=True, exist_ok=True)
    steps = workdir / f"steps-{os.environ['FAKE_WORKER']}"
    done = int(steps.read_text()) if steps.exists() else 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("saved") or 143))
    for _ in range(plan.get("lines", 0)):
        done += 1
        print(f"step {done}\ttab and  spaces ä", flush=True)
        steps.write_text(str(done))
    if "change" in plan:
        with world() as w:
            w["current"].update(plan["change"])
    end = plan.get("end")
    if end == "hang":
        while True:
            time.sleep(0.05)
    if end in ("killed", "rebooted"):
        if end == "rebooted":
            (directory / "boot").write_text("another boot\n")
        os.kill(int((directory / "main").read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    print("without a line end", end="", flush=True)
    sys.exit(plan.get("exit", 0))


main(sys.argv[3:])
