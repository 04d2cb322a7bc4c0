"""A preference model from its name. No JAX before a model needs it."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_jax.bucket.path import as_path
from dpo_jax.config.judges import GOLD, IMPLICIT, divided
from dpo_jax.config.opened import is_run
from dpo_jax.errors import UserError
from dpo_jax.preference.models import Ensemble, PreferenceModel
from dpo_jax.preference.rules import load_function
from dpo_jax.weights.hub import ADAPTER_CONFIG, CONFIG, local_model
from dpo_jax.weights.model_files import read_model_json


def load_preference_model(spec: str, **options: Any) -> PreferenceModel:
    """The preference model of a name.

    Args:
      spec: a directory in Hugging Face's layout or a hub's id (a reward model, or a causal one that is asked in words:
        its files tell), a run's directory, `http://HOST/v1|MODEL`, `implicit:POLICY,REFERENCE`, `module:function`,
        `gold`, or several of these with commas, whose verdicts are averaged.
      options: of the kind, such as `dtype`, `prompt_format` and `chat_template` of models, or those of
        `server.connect`.

    Raises:
      UserError: there is no such judge, it cannot be loaded, or it has no such option.
    """
    names = divided(spec)
    models = tuple(_load_one(name, options) for name in names)
    return models[0] if len(models) == 1 else Ensemble(models)


def _load_one(name: str, options: dict[str, Any]) -> PreferenceModel:
    if name == GOLD:
        from dpo_jax.preference.gold import gold

        return _called(name, gold, options)
    if name.startswith(("http://", "https://")):
        from dpo_jax.preference.server import connect

        return _called(name, connect, options, name)
    if name.startswith(IMPLICIT):
        from dpo_jax.preference.implicit import load_implicit

        policy, reference = (directory_of(part) for part in name.removeprefix(IMPLICIT).split(","))
        return _called(name, load_implicit, options, policy, reference)
    if _is_function(name):
        return _called(name, load_function, options, name)
    return load_model_judge(name, **options)


def model_names(spec: str) -> list[str]:
    """Of a judge's name the directories and hub's ids of models, whose files decide what it says."""
    found: list[str] = []
    for name in divided(spec) if spec else ():
        if name.startswith(IMPLICIT):
            found += name.removeprefix(IMPLICIT).split(",")
        elif name != GOLD and not name.startswith(("http://", "https://")) and not _is_function(name):
            found.append(name)
    return found


def _is_function(name: str) -> bool:
    """Whether a name is `module:function`: no directory, and no path."""
    module, colon, function = name.partition(":")
    return bool(colon) and not Path(name).exists() and "/" not in name and bool(module and function)


def load_model_judge(name: str, **options: Any) -> PreferenceModel:
    """The judge that a model's directory, a run or a hub's id is."""
    directory = directory_of(name)
    if is_reward_model(directory):
        from dpo_jax.preference.reward import load_reward_model

        return _called(name, load_reward_model, options, directory)
    from dpo_jax.preference.generative import load_generative

    return _called(name, load_generative, options, directory)


def directory_of(name: str) -> str:
    """What a model's name stands for: a run's export, or itself.

    Raises:
      UserError: a run has no export, or there is no such directory.
    """
    path = as_path(name).expanduser()
    if path.is_dir() and is_run(path):
        if not (path / "export" / CONFIG).is_file():
            raise UserError(f"judge {name}: the run has no export/ yet; let it end, with --config.export=True")
        return str(path / "export")
    local_model(name, what="judge")
    return name


def is_reward_model(directory: str) -> bool:
    """Whether the model of a directory or a hub's id has a head for scores, by its config.json."""
    from dpo_jax.weights.heads import is_classifier
    from dpo_jax.weights.hub import resolve_model

    files = resolve_model(directory, what="judge", with_weights=False)
    if files.adapter is not None and read_model_json(files.adapter / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS":
        return True
    hf = read_model_json(files.directory / CONFIG)
    named = [str(one) for one in hf.get("architectures") or []]
    if is_classifier(hf) or any("RewardModel" in one or "ValueHead" in one for one in named):
        return True
    from dpo_jax.weights.stored import HEAD_NAMES, open_tensors

    if not any(files.directory.glob("*.safetensors")):  # of the hub, before it is downloaded
        return False
    with contextlib.ExitStack() as stack:
        return any(name in HEAD_NAMES for name in open_tensors(files.directory, stack))


def _called(name: str, make: Callable[..., PreferenceModel], options: dict[str, Any], *args: str) -> PreferenceModel:
    """A judge made with the options that it takes.

    Raises:
      UserError: it has no such option.
    """
    import inspect

    takes = inspect.signature(make).parameters.values()
    known = {p.name for p in takes if p.kind == p.KEYWORD_ONLY}
    for option in options:
        if option not in known:
            has = f"has {', '.join(sorted(known))}" if known else "has no options"
            raise UserError(f"{option}={options[option]!r}: the judge {name} {has}; leave it out")
    return make(*args, **options)
