"""Several processes of one run: how they find each other, and how one ends that cannot continue."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from dpo_jax.errors import STUCK, UserError
from dpo_jax.parallel.address import answers, host_and_port, try_to_listen

JOIN_SECONDS = 300.0  # for which a process waits for the others at the start
SILENT_SECONDS = 10.0  # of these, before it says so
# Words of what JAX raises when a process that it talks to is gone.
_OF_A_PEER = ("gloo", "closed by peer", "connection reset", "unavailable", "heartbeat", "socket closed")


def join(bind: str = "", stuck_after: float = 0.0) -> None:
    """Join the other processes: a TPU pod knows them; elsewhere the environment names them.

    Args:
      bind: where the first process listens, HOST or HOST:PORT; empty: at all its addresses.
      stuck_after: seconds after which waiting for the others ends this process, if that is less than `JOIN_SECONDS`.

    Raises:
      UserError: they are not known, or this process cannot listen where it is asked to.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    bind = bind or os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "")
    seconds = min(stuck_after or JOIN_SECONDS, JOIN_SECONDS)
    given: dict[str, Any] = {}
    try:
        if address:
            count, index = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
            if not 0 <= index < count:
                raise ValueError(f"JAX_PROCESS_ID={index} is not one of JAX_NUM_PROCESSES={count}")
            given = {"coordinator_address": address, "num_processes": count, "process_id": index}
        listens = _listens_at(bind, address, is_first=bool(address) and index == 0)
        with _awaited_peers(address, given, seconds):
            # JAX's own limit would abort this process with a stack of C++.
            jax.distributed.initialize(
                **given, initialization_timeout=int(JOIN_SECONDS) + 60, coordinator_bind_address=listens
            )
    except (KeyError, ValueError) as e:
        raise UserError(
            f"--distributed: the other processes are not known ({e}); on a TPU pod they are, elsewhere set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None
    except RuntimeError as e:  # of JAX, and of what it asks on a cluster
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"--distributed: the processes could not join ({first})", code=STUCK) from None


def _listens_at(bind: str, address: str, *, is_first: bool) -> str | None:
    """`bind` as JAX takes it, with a port; None: at all addresses. The first process tries it, as JAX would crash."""
    host, port = "", None
    if address:
        _, port = host_and_port("JAX_COORDINATOR_ADDRESS", address)
        if port is None:
            raise ValueError(f"JAX_COORDINATOR_ADDRESS={address} has no port")
    if bind:
        host, own = host_and_port("coordinator_bind", bind)
        port = own or port
        if port is None:
            raise UserError(
                f"coordinator_bind={bind}: where JAX_COORDINATOR_ADDRESS is not set, a port is needed; on Cloud TPU "
                f"JAX takes 8476: {bind}:8476"
            )
    if is_first:
        try_to_listen(host, port)
    return f"{f'[{host}]' if ':' in host else host}:{port}" if bind else None


@contextlib.contextmanager
def _awaited_peers(address: str, given: Mapping[str, Any], seconds: float) -> Iterator[None]:
    """While in here, what is waited for is said, and after `seconds` this process ends with a line."""
    joined, silent = threading.Event(), min(SILENT_SECONDS, seconds / 2)
    me = f"process {given['process_id']} of {given['num_processes']}" if given else "this process"
    where = f" at {address}" if address else ""

    def wait() -> None:
        if joined.wait(silent):
            return
        with contextlib.suppress(OSError):
            print(f"{me} waits for the others{where}, {seconds:.0f} s at most", flush=True)
        if joined.wait(seconds - silent):
            return
        host, port = host_and_port("address", address) if address else ("", None)
        hint = f"; nothing listens at {address}, where process 0 should" if port and not answers(host, port) else ""
        print(
            f"error: {me} has waited {seconds:.0f} s for the other processes of this run to join{where}{hint}, so it "
            f"ends (exit code {STUCK}); start all of them within that time, by the same command",
            file=sys.stderr,
            flush=True,
        )
        os._exit(STUCK)

    threading.Thread(target=wait, name="join", daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def is_first() -> bool:
    """Whether this is the process that writes: the only one, or the first of several."""
    return jax.process_index() == 0


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
    time.sleep(5.0 if jax.process_index() == 0 else 0.0)
    os._exit(STUCK)
