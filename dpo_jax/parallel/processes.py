"""Several processes of one run: how they find each other, and how one ends that cannot continue."""

import os
import sys
import threading
import time

import jax

from dpo_jax.errors import STUCK, UserError

# Before they end, JAX's processes wait for each other: after an error that only this process has it would wait five
# minutes for the others.
LEAVE_SECONDS = 10.0
# Words of what JAX raises when a process that it talks to is gone.
_OF_A_PEER = ("gloo", "closed by peer", "connection reset", "unavailable", "heartbeat", "socket closed")


def join() -> None:
    """Join the other processes: a TPU pod knows them; elsewhere the environment names them.

    Raises:
      UserError: they are not known.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        if address:
            count, index = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
            jax.distributed.initialize(address, count, index)
        else:
            jax.distributed.initialize()
    except (KeyError, ValueError) as e:
        raise UserError(
            f"--distributed: the other processes are not known ({e}); on a TPU pod they are, elsewhere set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None


def is_first() -> bool:
    """Whether this is the process that writes: the only one, or the first of several."""
    return jax.process_index() == 0


def leave(code: int) -> int:
    """The exit code, with which this process ends soon even where others keep it waiting."""
    if jax.distributed.is_initialized():
        threading.Thread(target=_end, args=(code, LEAVE_SECONDS), daemon=True).start()
    return code


def is_of_a_lost_peer(error: BaseException) -> bool:
    """Whether an error means that another process of this run is gone, or silent for longer than Gloo waits: 30 s."""
    said = str(error).lower()
    if not jax.distributed.is_initialized():
        return False
    # Orbax raises what it caught anew, as another kind of error with the same words.
    return "gloo" in said or (isinstance(error, jax.errors.JaxRuntimeError) and any(w in said for w in _OF_A_PEER))


def end_if_a_peer_is_gone(error: BaseException) -> None:
    """End this process with an error line if another one is gone; return if the error means anything else."""
    if not is_of_a_lost_peer(error):
        return
    said = str(error).strip().splitlines()[0]
    print(
        f"error: another process of this run is gone or silent ({said}), so this one ends too (exit code {STUCK}); "
        "checkpoints are kept, and the same command on all of them resumes the run",
        file=sys.stderr,
        flush=True,
    )
    # JAX aborts the others as soon as the first process is gone, so that one waits for them to print their lines.
    _end(STUCK, LEAVE_SECONDS / 2 if jax.process_index() == 0 else 0.0)


def _end(code: int, seconds: float) -> None:
    time.sleep(seconds)
    os._exit(code)
