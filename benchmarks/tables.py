"""What `compare.py` measured, as tables in Markdown."""

import re
import statistics
from pathlib import Path
from typing import Any

PARTS = ("prompt", "chosen", "rejected")
LABELS = {
    "dpo_jax": "dpo_jax",
    "dpo_jax-reward": "dpo_jax, reward model",
    "trl": "TRL float32",
    "trl-bf16": "TRL bf16",
    "trl-reward": "TRL RewardTrainer float32",
    "tunix": "Tunix float32",
}
NAMES = {"hh": "HH harmless-base", "ultrafeedback": "UltraFeedback"}
COLUMNS = (
    "data, limits in tokens, pairs a step", "trainer", "pairs at once", "s/step", "pairs/s", "real tokens/s",
    "share of matmul peak", "peak memory", "dpo_jax: pairs/s", "memory",
)  # fmt: skip
TPU_COLUMNS = (
    "slice", "layout", "pairs a step", "remat", "TFLOP a pair", "of 8N a token", "GB through HBM a pair", "GiB a chip"
)  # fmt: skip
ABLATION_COLUMNS = ("dpo_jax's step", "s/step", "times the full step", "XLA's temporaries", "real tokens")


def _markdown(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def work(lengths: list[list[int]], model: dict[str, int], *, shared: bool, task: str = "dpo") -> tuple[int, float]:
    """Real tokens of a step, and the operations that training on them needs.

    Args:
      lengths: [prompt, chosen, rejected] in tokens of every pair.
      model: parameters of the `body` and of the vocabulary's `projection`.
      shared: whether a prompt is computed once for both completions.
      task: "dpo" or "reward".

    Returns:
      Tokens, and 8 operations for each of them and parameter (2 forward, 4 backward, 2 of the reference's forward); the
      projection is needed for completion tokens only. A reward model has neither reference nor projection. Attention's
      own products and what is computed twice to save memory are not counted.
    """
    completions = sum(c + r for _, c, r in lengths)
    tokens = completions + sum(p for p, _, _ in lengths) * (1 if shared else 2)
    if task == "reward":
        return tokens, 6.0 * model["body"] * tokens
    return tokens, 8.0 * (model["body"] * tokens + model["projection"] * completions)


def judge(cell: dict[str, Any], trainer: str, model: dict[str, int]) -> dict[str, float]:
    """A trainer's medians in one cell, of the steps that were timed."""
    timed = [i for i, r in enumerate(cell["records"][trainer]) if i > 0 and not r.get("compiled")]
    records = [cell["records"][trainer][i] for i in timed]
    task = cell.get("task", "dpo")
    done = [work(cell["lengths"][i], model, shared=trainer == "dpo_jax", task=task) for i in timed]
    seconds = [r["seconds"] for r in records]
    peak = statistics.median(cell["peak_gflops"]) * 1e9
    return {
        "seconds": statistics.median(seconds),
        "pairs": statistics.median(len(cell["lengths"][i]) / s for i, s in zip(timed, seconds, strict=True)),
        "tokens": statistics.median(tokens / s for (tokens, _), s in zip(done, seconds, strict=True)),
        "share": statistics.median(operations / s / peak for (_, operations), s in zip(done, seconds, strict=True)),
        "memory": max(r["peak_gb"] for r in cell["records"][trainer]),
        "steps": len(timed),
    }


def _row(where: str, spec: str, m: dict[str, float], ratios: tuple[str, str] = ("", "")) -> list[str]:
    trainer, _, at_once = spec.partition(":")
    at_once = at_once.replace("/", ", remat=")
    numbers = [at_once, f"{m['seconds']:.1f}", f"{m['pairs']:.3f}", f"{m['tokens']:.0f}", f"{m['share']:.0%}"]
    return [where, LABELS[trainer], *numbers, f"{m['memory']:.1f} GB", *ratios]


def comparison(here: dict[str, Any], model: dict[str, int]) -> str:
    """A line for each peer, with dpo_jax's ratio to it in the same run, below dpo_jax's own medians of all its runs."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for key, cell in here["cells"].items():
        *group, spec = key.split()
        if spec != "ablation":
            groups.setdefault(tuple(group), {})[spec] = cell
    rows = []
    for (data, batch, limits, own), cells in groups.items():
        ours = {spec: judge(cell, "dpo_jax", model) for spec, cell in cells.items()}
        both = {key: statistics.median(m[key] for m in ours.values()) for key in next(iter(ours.values()))}
        rows.append(_row(f"{NAMES[data]}, {limits}, {batch}", own, both))
        for spec, cell in cells.items():
            theirs, mine = judge(cell, spec.partition(":")[0], model), ours[spec]
            ratios = f"**{mine['pairs'] / theirs['pairs']:.2f}x**", f"{mine['memory'] / theirs['memory']:.2f}x"
            rows.append(_row("", spec, theirs, ratios))
    return _markdown(COLUMNS, rows) if rows else "no trainer was compared"


def ablation(cell: dict[str, Any]) -> str:
    """What each part of the step is worth."""
    rows = []
    medians = {name: statistics.median(v["seconds"]) for name, v in cell["variants"].items()}
    full = next(iter(medians))
    for name, v in cell["variants"].items():
        # By steps, as a noisy minute meets all variants of its round.
        ratio = statistics.median(x / y for x, y in zip(v["seconds"], cell["variants"][full]["seconds"], strict=True))
        rows.append([name, f"{medians[name]:.1f}", f"{ratio:.2f}x", f"{v['temporary_gb']:.2f} GB", f"{v['fill']:.0%}"])
    return _markdown(ABLATION_COLUMNS, rows)


def _tpu_cells(row: dict[str, Any]) -> list[str]:
    named = [row["topology"], row["layout"], str(row["pairs"]), row["remat"]]
    if "error" in row:
        return [*named, f"does not fit: {row['error']}", "", "", ""]
    numbers = [f"{row['flops'] / 1e12:.1f}", f"{row['of_8n']:.2f}x", f"{row['hbm_bytes'] / 1e9:.1f}"]
    return [*named, *numbers, f"{row['gib']:.1f}"]


def tpu_line(row: dict[str, Any]) -> str:
    """One compiled step in a line of plain text."""
    return "  ".join(x for x in _tpu_cells(row) if x)


def tpu(results: dict[str, Any]) -> str:
    """What steps of both layouts cost on TPU, as compiled."""
    rows = results.get("tpu", [])
    return _markdown(TPU_COLUMNS, [_tpu_cells(row) for row in rows]) if rows else "nothing was compiled for TPU"


def setting(here: dict[str, Any]) -> str:
    """A machine's system, its peak, its load and the versions."""
    cells = here["cells"].values()
    peaks = [x for cell in cells for x in cell.get("peak_gflops", [])]
    loads = [x for cell in cells for x in cell["load"]]
    lines = [f"{here['system']}."]
    if peaks:
        lines.append(
            f"Float32 matmul peak in these runs: median {statistics.median(peaks):.0f} GFLOP/s, from {min(peaks):.0f} "
            f"to {max(peaks):.0f}. Load average before and after a cell: {min(loads):.1f} to {max(loads):.1f}."
        )
    versions = (named for cell in cells for named in cell["versions"].items())
    lines += dict.fromkeys(f"{name}: {', '.join(f'{k} {v}' for k, v in found.items())}." for name, found in versions)
    for key, cell in here["cells"].items():
        if "records" in cell:
            lines.append(f"{key}: {_agreement(cell)}")
    return "\n".join(f"- {line}" for line in lines)


def _agreement(cell: dict[str, Any]) -> str:
    """Whether both trainers did the same: what they logged of the same batches."""
    ours, theirs = (list(x) for x in cell["records"].values())
    rounds = list(zip(ours, theirs, strict=True))
    fill = statistics.mean(x["fill"] for x in ours)
    if cell.get("task") == "reward":
        loss = max(abs(x["loss"] - y["loss"]) for x, y in rounds)
        rows = f"dpo_jax's rows {fill:.0%} real; {cell['began']}"
        return f"{len(rounds)} steps, largest difference of the loss {loss:.1e}; {rows}"
    loss = max(abs(x["dpo_loss"] - y["dpo_loss"]) for x, y in rounds)
    logp = max(abs(rounds[0][0][name] - rounds[0][1][name]) for name in ("chosen_logp", "rejected_logp"))
    return (
        f"{len(rounds)} steps, largest difference of the loss {loss:.1e}, of the first batch's mean log-probabilities "
        f"{logp:.2g} (of {ours[0]['chosen_logp']:.0f}); dpo_jax's rows {fill:.0%} real; {cell['began']}"
    )


def comparisons(results: dict[str, Any]) -> str:
    """Every machine's setting and comparison."""
    made = []
    for name, here in results["machines"].items():
        made.append(f"### {name}\n{setting(here)}\n\n{comparison(here, results['model'])}")
    return "\n\n".join(made) or "no trainer was compared"


def ablations(results: dict[str, Any]) -> str:
    """Every machine's ablation."""
    made = []
    for name, here in results["machines"].items():
        for key, cell in here["cells"].items():
            if key.endswith(" ablation"):
                made.append(f"{name}; {cell['began']}:\n\n{ablation(cell)}")
    return "\n\n".join(made) or "no ablation was measured"


TABLES = {"comparisons": comparisons, "ablations": ablations, "tpu": tpu}


def write(page: Path, results: dict[str, Any]) -> None:
    """Replace what stands between the page's markers."""
    text = page.read_text()
    for name, make in TABLES.items():
        between = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        assert between.search(text), f"{page} has no <!-- {name} --> ... <!-- end -->"
        made = make(results)
        text = between.sub(lambda m, made=made: m[1] + made + "\n" + m[2], text)
    page.write_text(text)
