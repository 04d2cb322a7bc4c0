"""Names of preference models, as keys and flags give them; what they stand for is `preference/load.py`'s. No JAX."""

from pathlib import Path

from dpo_jax.errors import UserError

IMPLICIT, GOLD = "implicit:", "gold"
FORMS = "DIR or RUN, http://HOST/v1|MODEL, implicit:POLICY,REFERENCE, module:function, gold"


def divided(spec: str) -> list[str]:
    """The names of the single judges: those between commas, but for the one within `implicit:`.

    Raises:
      UserError: one is empty, or names a policy without its reference.

    >>> divided("gold,implicit:a,b,my:rule")
    ['gold', 'implicit:a,b', 'my:rule']
    """
    parts = [part.strip() for part in spec.split(",")]
    names = []
    while parts:
        name = parts.pop(0)
        if name.startswith(IMPLICIT):
            if not parts or not parts[0] or name == IMPLICIT:
                raise UserError(f"judge {name}: needed is implicit:POLICY,REFERENCE, two directories or ids")
            name += "," + parts.pop(0)
        if not name:
            raise UserError(f"judge {spec!r} has an empty name; needed is {FORMS}, or several with commas")
        names.append(name)
    return names


def same_judges(one: str, other: str) -> list[str]:
    """The single judges of `one` that are among those of `other`, however their directories are written.

    >>> same_judges("gold,http://host/v1/|m", "my:rule,http://host/v1|m"), same_judges("runs/rm", "./runs/rm/export/")
    (['http://host/v1/|m'], ['runs/rm'])
    """
    theirs = {_meant(name) for name in divided(other)}
    return [name for name in divided(one) if _meant(name) in theirs]


def _meant(name: str) -> str:
    """A name of which all spellings are one: of a run its directory, which stands for its export."""
    if name.startswith(("http://", "https://")):
        address, bar, model = name.partition("|")
        return address.rstrip("/") + bar + model
    if name.startswith(IMPLICIT):
        return IMPLICIT + ",".join(map(_meant, name.removeprefix(IMPLICIT).split(",")))
    if ":" in name or name == GOLD:
        return name
    path = Path(name).expanduser().absolute()
    return str(path.parent if path.name == "export" else path)
