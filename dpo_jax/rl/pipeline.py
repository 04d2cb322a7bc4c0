"""RLHF's stages one after the other: SFT, a reward model, RL against it. Each is a run in a directory of its own.

DIR/stages.json has, of every stage that is done, what its export was made of and what it is, by content: a stage that
is done and unchanged is not done again, and one that was made of something else is refused.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dpo_jax.bucket.path import BucketPath
from dpo_jax.config.stages import Stage
from dpo_jax.data.files import fingerprint
from dpo_jax.disk import digest, read_json, write_json, write_whole
from dpo_jax.errors import UserError
from dpo_jax.parallel.mesh import any_process
from dpo_jax.records.records import Record, best_evaluation, read_metrics, show_metric
from dpo_jax.records.shapes import StageDone
from dpo_jax.report.stages import write_stages_report

STATE, RESULT, RECORDS = "stages.json", "result.json", "metrics.jsonl"


def run_stages(
    stages: Sequence[Stage],
    workdir: Path,
    run_stage: Callable[[Mapping[str, Any], Path], Any],
    say: Callable[[str], None],
) -> None:
    """Run those of the stages that are not done; every process of several calls it.

    Args:
      run_stage: (config, directory): trains, or resumes the run that is there.
      say: is told what is begun and what was done before.

    Raises:
      UserError: a stage lacks what it is made of, or was made of something else.
      Stopped: a signal came; the same call goes on.
    """
    for number, stage in enumerate(stages, 1):
        where, entry = workdir / stage.name, _kept(workdir).get(stage.name)
        of = {key: _digest_of(workdir / other / "export", stage, other) for key, other in stage.made_of.items()}
        head = f"stage {number} of {len(stages)}, {stage.name}"
        if entry is not None and entry["made_of"] != of:
            changed = ", ".join(stage.made_of[key] for key in of if entry["made_of"].get(key) != of[key])
            raise UserError(f"{where} was made of another {changed} than is there now; remove {where} to make it anew")
        export = export_digest(where / "export") if entry is not None and (where / "export").is_dir() else ""
        if entry is not None and export and entry["export"] != export:
            raise UserError(f"{where / 'export'} is not as the stage left it; remove {where} to make it anew")
        if not any_process(not export):
            say(f"{head}: done before")
            continue
        say(f"{head}: {where}")
        run_stage(stage.config, where)
        if jax.process_index() == 0:
            made = {"made_of": of, "export": export_digest(where / "export")}
            write_json(workdir / STATE, _kept(workdir) | {stage.name: made})
        any_process(False)  # the others read it next
        if jax.process_index() == 0:
            write_whole(workdir / RECORDS, "".join(json.dumps(r) + "\n" for r in joined_records(workdir)))
    if jax.process_index() == 0:
        came = result(workdir)
        if (workdir / "rl" / RECORDS).is_file():
            write_json(workdir / RESULT, came)
        page = write_stages_report(workdir, came)
        say(f"report {page}" + (f", {shown(came)}" if came else ""))


def shown(came: Mapping[str, Any]) -> str:
    """What came of it in words."""
    error = lambda name: f" ± {show_metric(name, came[f'{name}_error'])}" if came.get(f"{name}_error") else ""
    names = ("reward_model_accuracy", "win_rate", "kl", "mean_length")
    return ", ".join(f"{name} {show_metric(name, came[name])}{error(name)}" for name in names if name in came)


def _kept(workdir: Path) -> dict[str, Any]:
    mend = "remove it to do all stages anew"
    return read_json(workdir / STATE, mend, dict[str, StageDone]) if (workdir / STATE).exists() else {}


def _digest_of(export: Path, stage: Stage, other: str) -> str:
    if not export.is_dir():
        raise UserError(
            f"stage {stage.name} is made of {export}, which is not there; run that stage first: --stages={other}"
        )
    return export_digest(export)


def export_digest(export: Path) -> str:
    """What tells a model's files from any others, by their content."""
    if isinstance(export, BucketPath):
        held = sorted((p.name, p.listed.size, p.listed.crc32c) for p in export.iterdir() if p.listed is not None)
        return digest(json.dumps([one for one in held if one[0].endswith((".safetensors", ".json"))]))
    files = sorted([*export.glob("*.safetensors"), *export.glob("*.json")])
    return digest(json.dumps([[path.name, fingerprint(str(path))["digest"]] for path in files]))


def joined_records(workdir: Path) -> list[Record]:
    """The records of all stages: updates of each under its name as `split`, evaluations with it as `stage`."""
    found: list[Record] = []
    for stage in ("sft", "reward", "rl"):
        for record in read_metrics(workdir / stage / RECORDS):
            said = record.get("split")
            split = stage if said == "train" else said
            found.append(record | {"split": split, "stage": stage})
    return found


def result(workdir: Path) -> dict[str, Any]:
    """What came of it: `win_rate` with `win_rate_error`, `kl` and `mean_length` of the policy that is exported.

    And `reward_model_accuracy` on held-out pairs with its standard error, where a reward model was trained. What was
    not measured is not there.
    """
    of_rl = read_metrics(workdir / "rl" / RECORDS)
    evaluations = [r for r in of_rl if r["split"] == "eval"]
    best = best_evaluation(of_rl) or (evaluations[-1] if evaluations else {})
    names = ("step", "win_rate", "win_rate_error", "win_rate_ties", "kl", "kl_error", "reward", "mean_length")
    found = {name: best[name] for name in names if name in best}
    of_reward = [r for r in read_metrics(workdir / "reward" / RECORDS) if r["split"] == "eval"]
    if of_reward and of_reward[-1].get("accuracy") is not None and of_reward[-1].get("pairs"):
        accuracy, pairs = of_reward[-1]["accuracy"], of_reward[-1]["pairs"]
        error = (accuracy * (1 - accuracy) / pairs) ** 0.5
        found |= {"reward_model_accuracy": accuracy, "reward_model_accuracy_error": error}
    return found
