"""What must not be in a compiled loop over tokens: the loop of a program whose trips nobody knows."""

from dpo_jax.plan.hlo.bytes import moved_bytes
from dpo_jax.plan.hlo.loops import trip_count
from dpo_jax.plan.hlo.text import HBM, HOST, arrays, parse_hlo

FROM_OR_TO_HOST = "infeed outfeed send send-done recv recv-done".split()


def _dims(shape):
    """The dimensions in any order, as a compiler may transpose; those of 1 are left out."""
    return tuple(sorted(size for size in shape if size > 1))


def _loops(module, computation, known=False):
    """Bodies of loops that are not known, and of all in them; none where there is no such loop."""
    for it in computation.instructions.values():
        if it.opcode == "while":
            body, inside = module.called(it, "body"), known or trip_count(module, computation, it) is None
            if inside:
                yield body
            yield from _loops(module, body, inside)
        elif it.opcode == "call":
            if known:
                yield module.called(it)
            yield from _loops(module, module.called(it), known)


def copies(text, shapes):
    """Instructions in the loop that write, into the device's memory, a whole array of one of these shapes."""
    module, wanted, found = parse_hlo(text), set(map(_dims, shapes)), []
    bodies = list(_loops(module, module.computations[module.entry]))
    assert bodies, "no loop"
    for body in bodies:
        for it in body.instructions.values():
            if it.opcode in ("while", "call", "conditional"):
                continue
            written = moved_bytes(module, body, it)[1]
            whole = [x for x in arrays(it.shape) if x.space == HBM and _dims(x.dims) in wanted]
            if any(written[HBM] >= x.bytes for x in whole):
                found.append(it.text.strip())
    return found


def transfers(text):
    """Instructions in the loop that ask the host for something, or give it something."""
    module, found = parse_hlo(text), []
    for body in _loops(module, module.computations[module.entry]):
        for it in body.instructions.values():
            call = it.quoted("custom_call_target").lower() if it.opcode == "custom-call" else ""
            host = "callback" in call or "host" in call or any(x.space == HOST for x in arrays(it.shape))
            if host or it.opcode in FROM_OR_TO_HOST:
                found.append(it.text.strip())
    return found
