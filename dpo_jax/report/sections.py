"""Parts of a run's page below its curves: held-out pairs, answers, data, and the files that it left."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.records.length_bias import GROUPS, RATIO
from dpo_jax.records.records import Record, before_after, show_metric
from dpo_jax.report.html import bar, count, fold, number, size, table, text
from dpo_jax.report.lengths import length_charts, length_words
from dpo_jax.report.runs import LENGTH_WORDS, Run, accuracy_error, metric_label, sources

OPEN_SAMPLES = 3  # prompts shown at once; the others are folded
MANY_FILES = 12  # of an export, listed


def held_out_table(run: Run) -> str:
    """Held-out pairs before and after, and the last evaluation's wins by source and by length."""
    rows = []
    for name, before, after in before_after(run.records):
        if "/" not in name:
            cells = (number(name, before), number(name, after), _change(name, before, after))
            rows.append((text(metric_label(name)), *cells))
    return (table(("", "before", "after", "change"), rows, narrow=True) if rows else "") + _groups(run)


def _change(name: str, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return ("+" if after > before else "") + number(name, after - before)


def _groups(run: Run) -> str:
    evaluations = [r for r in run.records if r["split"] == "eval" and r["step"]]
    if not evaluations:
        return ""
    last = max(evaluations, key=lambda r: r["step"])
    named = {name: name for name in sources(run)}
    bias = last.get("length_correlation")
    note = f"Longer: by more than {RATIO - 1:.0%} in tokens."
    if bias is not None:
        note += (
            f" Correlation of (chosen − rejected tokens) with the margin: {show_metric('length_correlation', bias)}. "
            "Near 0 margins do not depend on length; near 1 the policy prefers what is longer, near -1 what is shorter."
        )
    return _group_table(run, last, "by source", named) + (
        _group_table(run, last, "by length", {name: LENGTH_WORDS[name] for name in GROUPS}, note)
    )


def _group_table(run: Run, last: Mapping[str, Any], title: str, names: Mapping[str, str], note: str = "") -> str:
    rows = []
    for name, words in names.items():
        accuracy, pairs = last.get(f"accuracy/{name}"), last.get(f"pairs/{name}")
        if accuracy is None:
            continue
        error = accuracy_error(run, accuracy, pairs)
        shown = number("accuracy", accuracy) + (f" ± {number('accuracy', error)}" if error else "")
        rows.append((text(words), count(pairs), bar(accuracy), shown, number("margin", last.get(f"margin/{name}"))))
    if not rows:
        return ""
    below = f'<p class="note">{text(note.replace(" -", " −"))}</p>' if note else ""
    return table((title, "pairs", "", "accuracy", "margin"), rows, words=(0, 2), narrow=True) + below


def samples(run: Run) -> str:
    """Answers before and after, side by side, prompt by prompt."""
    prompts: dict[str, dict[tuple[str, str], Record]] = {}
    for sample in run.samples:
        prompts.setdefault(sample.get("prompt", ""), {})[sample.get("when", ""), sample.get("mode", "")] = sample
    blocks = [_sample(prompt, answers) for prompt, answers in prompts.items()]
    rest = blocks[OPEN_SAMPLES:]
    return "".join(blocks[:OPEN_SAMPLES]) + (
        fold(f"{len(rest)} more prompt{'s' * (len(rest) > 1)}", "".join(rest)) if rest else ""
    )


def _sample(prompt: str, answers: Mapping[tuple[str, str], Record]) -> str:
    def said(sample: Mapping[str, Any], key: str = "answer") -> str:
        words = str(sample.get(key, "")).strip()
        return f'<div class="said">{text(words)}</div>' if words else '<div class="said none">empty</div>'

    def side(when: str, mode: str) -> str:
        sample = answers.get((when, mode))
        if sample is None:
            return f'<div><h3>{text(when)}, {text(mode)}</h3><div class="said none">not sampled</div></div>'
        return f"<div><h3>{text(when)}, {text(mode)}</h3>{said(sample)}</div>"

    modes = dict.fromkeys(mode for _, mode in answers)
    pairs = "".join(side(when, mode) for mode in modes for when in ("before", "after"))
    any_sample = next(iter(answers.values()))
    truth = "".join(f'<div><h3 class="{key}">{key}</h3>{said(any_sample, key)}</div>' for key in ("chosen", "rejected"))
    return (
        f'<article class="sample"><div class="prompt"><h3>prompt</h3>{said({"answer": prompt})}</div>'
        f'<div class="pair">{pairs}</div>'
        + fold("The data set's answers", f'<div class="pair">{truth}</div>')
        + "</article>"
    )


def data(run: Run) -> str:
    """What was read, kept, dropped and truncated, and how long it is."""
    rows = [
        (
            text(source.get("name", "")),
            text(source.get("split", "")),
            count(source.get("read")),
            count(source.get("kept")),
            reasons(source.get("dropped", {})),
            reasons(source.get("truncated", {}), source.get("kept")),
        )
        for source in run.data.get("sources", [])
    ]
    splits = run.data.get("splits", {})
    lengths = [
        (
            text(split),
            count(entry.get("pairs")),
            text(part),
            *(count(stats.get(key)) for key in ("mean", "p50", "p90", "max")),
        )
        for split, entry in splits.items()
        for part, stats in entry.get("tokens", {}).items()
    ]
    files = "".join(
        f"<div><code>{text(file)}</code></div>" for s in run.data.get("sources", []) for file in s.get("files", [])
    )
    train = splits.get("train", {})
    words = f'<p class="note">{text(length_words(train["longer"], "training pairs"))}</p>' if "longer" in train else ""
    return (
        (table(("source", "split", "read", "kept", "dropped", "truncated"), rows, words=(0, 1, 4, 5)) if rows else "")
        + (
            table(("split", "pairs", "tokens of", "mean", "median", "p90", "max"), lengths, words=(0, 2))
            if lengths
            else ""
        )
        + words
        + length_charts(train.get("histograms", {}))
        + (fold("Files", f"<div>{files}</div>") if files else "")
    )


def reasons(found: Mapping[str, int], of: int | None = None) -> str:
    """Counts by reason, those of 0 left out; with their share of `of`."""
    parts = [
        f"<i>{text(reason.replace('_', ' '))} {count(n)}{f' ({n / of:.1%})' if of else ''}</i>"
        for reason, n in found.items()
        if n
    ]
    return " · ".join(parts) or '<span class="none">–</span>'


def files(run: Run) -> str:
    """Checkpoints and exports."""
    sft = int(run.config.get("sft_steps") or 0)
    saved = [
        (count(number), _updates(number, sft), size(held), _words(number == max(run.checkpoints), "newest"))
        for number, held in run.checkpoints.items()
    ]
    return (
        (table(("checkpoint", "holds", "size", ""), saved, words=(0, 1, 3), narrow=True) if saved else "")
        + ("".join(_export(name, found) for name, found in run.exports.items()))
        + (
            '<p class="note">The same command goes on from the newest checkpoint. <code>export/</code> is a Hugging '
            "Face directory: transformers and vLLM load it; its README.md is a model card.</p>"
            if saved or run.exports
            else ""
        )
    )


def _words(condition: bool, words: str) -> str:
    return text(words) if condition else ""


def _updates(number: int, sft: int) -> str:
    dpo = max(0, number - sft)
    parts = [f"{min(number, sft)} updates of SFT"] * bool(sft) + [f"{dpo} of DPO"] * bool(dpo or not sft)
    return text(", ".join(parts))


def _export(name: str, found: Mapping[str, int]) -> str:
    rows = [(f"<code>{text(file)}</code>", size(held)) for file, held in list(found.items())[:MANY_FILES]]
    if len(found) > MANY_FILES:
        rest: Sequence[int] = list(found.values())[MANY_FILES:]
        rows.append((f"and {len(rest)} more", size(sum(rest))))
    return table((f"{name}/", "size"), rows, narrow=True)
