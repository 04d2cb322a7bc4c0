"""Addresses at which processes find each other: HOST or HOST:PORT, and whether one can listen there."""

import errno
import re
import socket

from dpo_jax.errors import UserError

_NAME = r"[0-9A-Za-z_](?:[0-9A-Za-z._-]*[0-9A-Za-z])?"
_ADDRESS = re.compile(rf"(?:\[([0-9A-Fa-f:.]+)\]|({_NAME}))(?::([0-9]{{1,5}}))?", re.ASCII)


def host_and_port(name: str, text: str) -> tuple[str, int | None]:
    """An address in its parts; the port is None where none is said. `name` is what the text was given as.

    >>> host_and_port("bind", "10.0.0.2"), host_and_port("bind", "[::1]:8476")
    (('10.0.0.2', None), ('::1', 8476))

    Raises:
      UserError: it is none.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match[3] or 1) < 1 << 16:
        raise UserError(f"{name}={text!r} is no address; HOST:PORT is needed, such as 10.0.0.2:8476 or [::1]:8476")
    return match[1] or match[2], int(match[3]) if match[3] else None


def try_to_listen(host: str, port: int | None) -> None:
    """Refuse an address that is not this machine's, or a port that another process has; an empty host is all.

    Raises:
      UserError: nobody could listen there.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as e:
        named = f"coordinator_bind={host}, port {port}" if host else f"port {port} of JAX_COORDINATOR_ADDRESS"
        mend = (
            "end the process that has it, or give all processes another port"
            if e.errno == errno.EADDRINUSE
            else "give an address of the first process's own machine, or none for all of its addresses"
        )
        raise UserError(f"{named}: the first process cannot listen there ({e.strerror}); {mend}") from None


def answers(host: str, port: int) -> bool:
    """Whether anything listens there, within 5 seconds."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True
