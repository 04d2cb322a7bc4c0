"""The model card of an export: README.md, as the Hugging Face hub shows it.

Every number in it is one of the run's files. The format: https://huggingface.co/docs/hub/model-cards.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from huggingface_hub.repocard_data import EvalResult

from dpo_jax.data.datasets import DATASETS
from dpo_jax.data.sources import hub_dataset
from dpo_jax.records.records import before_after, show_metric
from dpo_jax.report.runs import Run, accuracy_error, held_out_pairs, is_dpo, last_step, metric_label
from dpo_jax.weights.hub import CARD

LICENSE_KEYS = ("license", "license_name", "license_link")
# What of the config a reader needs to do it again, where it is set at all.
RECIPE = """
    loss dpo_beta label_smoothing f_divergence wpo ld_alpha learning_rate lr_schedule warmup_steps optimizer
    weight_decay max_grad_norm batch_size num_epochs sft_steps sft_learning_rate lora_rank lora_alpha lora_targets
    max_prompt_length max_completion_length overlong prompt_format param_dtype seed
""".split()
OFF = (0, 0.0, "", False, None)


def write(run: Run, directory: Path, *, base: Path | None) -> None:
    """Write DIRECTORY/README.md, of a whole model or of adapters in PEFT's layout.

    Args:
      run: as its files have it.
      directory: an export.
      base: the files of the model that was trained, whose licence the card takes over; None if it was made from
        scratch.
    """
    adapter = (directory / "adapter_config.json").exists()
    (directory / CARD).write_text(card(run, base, adapter=adapter), encoding="utf-8")


def card(run: Run, base: Path | None, *, adapter: bool = False) -> str:
    """The card's text, see `write`."""
    data = _metadata(run, base, adapter=adapter)
    name = data.model_name or run.name
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        _introduction(run, data),
        "## Use\n\n" + (_use_adapter(run) if adapter else _use(run)),
        "## Recipe\n\n" + _recipe(run),
        "## Data\n\n" + _data(run),
        "## Held-out results\n\n" + _results(run),
        "## Versions\n\n" + _versions(run),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(run: Run, base: Path | None, *, adapter: bool) -> ModelCardData:
    datasets = _hub_datasets(run)
    known = _base_card(base)
    model = str(run.config.get("model", ""))
    tags = ["dpo", "dpo_jax", "preference-alignment", *(["lora", "peft"] if adapter else [])]
    return ModelCardData(
        base_model=model if _is_hub_id(model) else None,
        datasets=datasets or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        language=known.get("language"),
        model_name=_title(run),
        eval_results=_eval_results(run, datasets),
        **{key: known[key] for key in LICENSE_KEYS if key in known},
    )


def _title(run: Run) -> str:
    return f"{Path(str(run.config.get('model', run.name))).name}-dpo"


def _is_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "~", "/")) and not Path(model).exists()


def _base_card(base: Path | None) -> Mapping[str, Any]:
    """The front matter of the base model's card; empty where there is none that can be read."""
    path = None if base is None else base / CARD
    if path is None or not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except Exception:  # somebody else's file; a card of ours needs nothing of it
        return {}


def _hub_datasets(run: Run) -> list[str]:
    """The hub's names of what the run was trained on, as far as they have one."""
    names = [part["name"] for part in run.data.get("mixture", [])] or [str(run.config.get("dataset", ""))]
    return list(dict.fromkeys(found for name in names if (found := hub_dataset(name))))


def _eval_results(run: Run, datasets: Sequence[str]) -> list[EvalResult] | None:
    values = _last_evaluation(run)
    if "accuracy" not in values:
        return None
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=datasets[0] if datasets else "preferences",
            dataset_name=f"{run.config.get('dataset', 'preferences')} (held out)",
            metric_type="accuracy",
            metric_name="preference accuracy",
            metric_value=round(values["accuracy"], 4),
        )
    ]


def _last_evaluation(run: Run) -> dict[str, float]:
    return {name: after for name, _, after in before_after(run.records) if after is not None}


def _introduction(run: Run, data: ModelCardData) -> str:
    model, how = run.config.get("model"), "DPO" if is_dpo(run) else f"the preference loss `{run.config.get('loss')}`"
    base = f"[{model}](https://huggingface.co/{model})" if data.base_model else f"`{Path(str(model)).name}`"
    text = f"{base} aligned to preferences with {how}, by dpo_jax."
    return text + (
        "\n\nDirect Preference Optimization: Rafailov et al. 2023, [arXiv 2305.18290](https://arxiv.org/abs/2305.18290)."
        if is_dpo(run)
        else ""
    )


def _use(run: Run) -> str:
    chat = run.data.get("prompt_format") == "chat"
    prompt = (
        'text = tokenizer.apply_chat_template(\n    [{"role": "user", "content": "How do I store tomatoes?"}], '
        "tokenize=False, add_generation_prompt=True\n)\ninputs = tokenizer(text, add_special_tokens=False, "
        'return_tensors="pt")'
        if chat
        else 'inputs = tokenizer("\\n\\nHuman: How do I store tomatoes?\\n\\nAssistant:", return_tensors="pt")'
    )
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")  # this directory, or its name on the hub\n'
        'model = AutoModelForCausalLM.from_pretrained(".")\n'
        f"{prompt}\n"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0], skip_special_tokens=True))\n```\n\n"
        + (
            "The prompt's form is the tokenizer's chat template."
            if chat
            else "The prompt's form is that of the training data; there is no chat template."
        )
    )


def _use_adapter(run: Run) -> str:
    model = str(run.config.get("model"))
    base = model if _is_hub_id(model) else f"path/to/{Path(model).name}"
    return (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})\n"
        'model = PeftModel.from_pretrained(base, ".")  # this directory, or its name on the hub\n```'
    )


def _recipe(run: Run) -> str:
    rows = [(key, run.config[key]) for key in RECIPE if run.config.get(key) not in OFF]
    rows.append(("updates", last_step(run)))
    return _table(("setting", "value"), [(f"`{key}`", f"`{value}`") for key, value in rows])


def _data(run: Run) -> str:
    cells = []
    for source in run.data.get("sources", []):
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in source.get("dropped", {}).items() if n)
        cut = ", ".join(f"{part} {n:,}" for part, n in source.get("truncated", {}).items() if n)
        cells.append((source["name"], source["split"], f"{source['read']:,}", f"{source['kept']:,}", reasons, cut))
    table = _table(("source", "split", "rows read", "kept", "dropped", "truncated"), cells)
    splits = run.data.get("splits", {})
    counts = ", ".join(f"{splits[name]['pairs']:,} {words}" for name, words in SPLIT_WORDS.items() if name in splits)
    lines = [f"{counts}." if counts else "", f"Held out: {run.data['held_out']}." if "held_out" in run.data else ""]
    licences = {
        f"{found}: {spec.licence}" for spec in DATASETS.values() for found in _hub_datasets(run) if spec.hub == found
    }
    lines.append(f"Licences of the data: {'; '.join(sorted(licences))}." if licences else "")
    # Of a path on the machine that trained, its last name alone is anybody's business.
    return re.sub(r"(?<![\w:/])(?:/[^\s/,:;|]+)+/([^\s/,:;|]+)", r"\1", "\n\n".join(filter(None, [*lines, table])))


SPLIT_WORDS = {"train": "training pairs", "eval": "held-out pairs"}


def _results(run: Run) -> str:
    rows = []
    for name, before, after in before_after(run.records):
        error = accuracy_error(run, after) if name == "accuracy" else None
        shown = ["–" if v is None else show_metric(name, v) for v in (before, after)]
        rows.append((metric_label(name), shown[0], shown[1] + (f" ± {error:.3f}" if error is not None else "")))
    if not rows:
        return "No pairs were held out."
    words = (
        f"On {held_out_pairs(run):,} held-out pairs. Accuracy is the fraction of pairs whose chosen answer has the "
        "higher reward (chance is 0.5); a reward is β · (policy − reference log-probability), and the margin is the "
        "mean difference of the two rewards."
    )
    return words + "\n\n" + _table(("", "before", "after"), rows)


def _versions(run: Run) -> str:
    about = run.about
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    where = f"{about['devices']} × {about['device']}" if "device" in about else ""
    return "\n\n".join(filter(None, [versions, f"Trained on {where}." if where else ""])) or "Not recorded."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in row) + " |" for row in cells
    )
