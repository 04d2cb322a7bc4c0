"""The model card of an export: README.md, as the Hugging Face hub shows it.

Every number in it is one of the run's files. The format: https://huggingface.co/docs/hub/model-cards.
"""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from huggingface_hub.repocard_data import EvalResult

from dpo_jax.data.datasets import DATASETS
from dpo_jax.data.sources import hub_dataset
from dpo_jax.disk import read_json, write_whole
from dpo_jax.records.records import before_after, show_metric
from dpo_jax.report.html import render
from dpo_jax.report.runs import RunFiles, metric_label
from dpo_jax.weights.hub import CARD

LICENSE_KEYS = ("license", "license_name", "license_link")
SPLIT_WORDS = {"train": "training pairs", "eval": "held-out pairs"}


def write_card(run: RunFiles, directory: Path, *, base: Path | None) -> None:
    """Write README.md into an export, of a whole model or of adapters in PEFT's layout.

    `base` has the files of the model that was trained, whose licence the card takes over; None if it was made from
    scratch.
    """
    adapter = (directory / "adapter_config.json").exists()
    model, splits = run.saved.model, run.data.get("splits", {})
    datasets, on_hub, last_name = _hub_datasets(run), _is_hub_id(model), Path(model).name or "model"
    metadata = _metadata(run, datasets, base, adapter=adapter)
    if adapter:  # of an adapter that was trained over another one, the base without either
        model = str(read_json(directory / "adapter_config.json").get("base_model_name_or_path") or model)
        on_hub, last_name = _is_hub_id(model), Path(model).name or "model"
    text = render(
        "report/templates/card.md",
        metadata=metadata.to_yaml(),
        name=metadata.model_name,
        model=model,
        on_hub=on_hub,
        base_name=last_name,
        base_path=model if on_hub else f"path/to/{last_name}",
        is_dpo=run.saved.is_dpo,
        is_reward=run.saved.is_reward,
        pad=_pad(directory),
        made=_made(run),
        has_accuracy=any(name.startswith("Accuracy") for name, *_ in _results(run)),
        adapter=adapter,
        chat=run.data.get("prompt_format") == "chat",
        recipe=[
            (f"`{key}`", f"`{without_paths(str(value))}`")
            for key, value in (*run.saved.recipe, ("updates", run.last_step), *_commits(run))
        ],
        counts=[f"{splits[name]['pairs']:,} {words}" for name, words in SPLIT_WORDS.items() if name in splits],
        held_out=run.data.get("held_out"),
        licences=sorted({f"{known.hub}: {known.licence}" for known in DATASETS.values() if known.hub in datasets}),
        sources=_source_rows(run),
        without_paths=without_paths,
        results=_results(run),
        held_out_pairs=run.held_out_pairs,
        versions=", ".join(f"{name} {version}" for name, version in run.about.get("versions", {}).items()),
        hardware=run.hardware,
    )
    write_whole(directory / CARD, text)


def _made(run: RunFiles) -> str:
    """What the model was made to be, for the card's first sentence."""
    of_loss = "DPO" if run.saved.is_dpo else f"the preference loss `{run.saved.loss}`"
    return {
        "reward": "as a reward model of preferences (Bradley-Terry)",
        "comparison": "to say which of two answers is better",
        "sft": "fine-tuned on answers (SFT)",
        "rl": "trained by RL against a reward",
    }.get(run.saved.task, f"aligned to preferences with {of_loss}")


def _pad(directory: Path) -> int | None:
    """The token that a reward model's score is not read at, as the whole export beside has it."""
    config = directory.with_name("export") / "config.json"
    return read_json(config).get("pad_token_id") if config.is_file() else None


def _metadata(run: RunFiles, datasets: list[str], base: Path | None, *, adapter: bool) -> ModelCardData:
    known = _base_card(base)
    return ModelCardData(
        base_model=run.saved.model if _is_hub_id(run.saved.model) else None,
        datasets=datasets or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if run.saved.is_reward else "text-generation",
        tags=[
            run.saved.kind.lower().replace(" ", "-"),
            "dpo_jax",
            "preference-alignment",
            *(["lora", "peft"] if adapter else []),
        ],
        language=known.get("language"),
        model_name=f"{Path(run.saved.model or run.name).name}-{run.saved.task}",
        eval_results=_eval_results(run, datasets[0] if datasets else "preferences") or None,
        **{key: known[key] for key in LICENSE_KEYS if key in known},
    )


def _commits(run: RunFiles) -> list[tuple[str, str]]:
    """The hub's commits of the model, the reference and the data, as far as they came from there."""
    return [(f"{key} commit", f"{of['repository']}@{of['commit']}") for key, of in run.about.get("hub", {}).items()]


def _is_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "~", "/")) and not Path(model).exists()


def _base_card(base: Path | None) -> Mapping[str, Any]:
    """The front matter of the base model's card; empty where there is none that can be read."""
    if base is not None:
        with contextlib.suppress(Exception):  # not there, or another project's file, which may hold anything
            return metadata_load(base / CARD) or {}
    return {}


def _hub_datasets(run: RunFiles) -> list[str]:
    """The hub's names of what the run was trained on, as far as they have one."""
    return list(dict.fromkeys(filter(None, map(hub_dataset, _data_names(run)))))


def _data_names(run: RunFiles) -> list[str]:
    return [part["name"] for part in run.data.get("mixture", [])] or list(filter(None, [run.saved.dataset]))


def _public_name(name: str) -> str:
    """A data set's name; of a file of one's own, without its directories."""
    return name if hub_dataset(name) else Path(name).name


def _eval_results(run: RunFiles, dataset: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-classification" if run.saved.is_reward else "text-generation",
            dataset_type=dataset,
            dataset_name=f"{', '.join(map(_public_name, _data_names(run))) or 'preferences'} (held out)",
            metric_type="accuracy",
            metric_name="preference accuracy",
            metric_value=round(accuracy, 4),
        )
        for name, _, accuracy in before_after(run.records)
        if name == "accuracy" and accuracy is not None
    ]


def _source_rows(run: RunFiles) -> list[tuple[str, ...]]:
    def counts(reasons: Mapping[str, int]) -> str:
        return ", ".join(f"{reason} {n:,}" for reason, n in reasons.items() if n)

    rows = []
    for source in run.data.get("sources", []):
        reasons = [counts(source.get(key, {})) for key in ("dropped", "truncated")]
        numbers = [f"{source[key]:,}" if key in source else "–" for key in ("read", "kept")]
        rows.append((source["name"], source["split"], *numbers, *reasons))
    return rows


def without_paths(text: str) -> str:
    """The text with only the last name of every path: the directories are private to the machine that trained.

    >>> without_paths("a reward of gs://bucket/runs/reward/export*0.5")
    'a reward of export*0.5'
    >>> without_paths("512 pairs of /home/me/pairs.jsonl, a reward of ~/runs/reward/export*0.5")
    '512 pairs of pairs.jsonl, a reward of export*0.5'
    """
    text = re.sub(r"gs://(?:[^\s/,:;|*]+/)+", "", text)
    return re.sub(r"(?<![\w:/.~])(?:~|\.{1,2})?(?:/[^\s/,:;|*]+)+/([^\s/,:;|*]+)", r"\1", text)


def _results(run: RunFiles) -> list[tuple[str, str, str]]:
    rows = []
    for name, before, after in before_after(run.records):
        error = run.standard_error(name, after)
        shown = ["–" if v is None else show_metric(name, v) for v in (before, after)]
        rows.append((metric_label(name), shown[0], shown[1] + (f" ± {error:.3f}" if error is not None else "")))
    return rows
