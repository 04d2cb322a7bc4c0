"""A run's records: what one is, how its numbers are shown to a person, and the JSON-lines files that hold them.

`metrics.jsonl` is the truth about a run: one strict JSON object a line, appended and flushed, so that a killed run
loses at most the line it was writing. JSON has neither NaN nor infinity: a number that is not finite is written as
`null`, and readers treat it as missing.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_jax.disk import check_shape, parse_json, read_pieces, write_whole
from dpo_jax.errors import UserError
from dpo_jax.records.shapes import MetricRecord

Record = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """How a metric is shown to a person.

    label: its name on pages.
    form: the format of its numbers.
    short: its name in a console line; empty: not there.
    held_out: compared before and after training.
    over: what it is a mean over, in a batch as in all held-out pairs; "the loss's": see `objective.table.Loss.over`;
      empty: it is no mean.
    """

    label: str
    form: str = ".4g"
    short: str = ""
    held_out: bool = False
    over: str = ""


# In the order in which console lines and tables show them; a metric that is not listed gets four significant digits.
METRICS = {
    "loss": Metric("Loss", ".4f", "loss", held_out=True, over="chosen tokens"),
    "dpo_loss": Metric("DPO loss", ".4f", "dpo_loss", held_out=True, over="the loss's"),
    "accuracy": Metric("Accuracy", ".3f", "accuracy", held_out=True, over="pairs"),
    "margin": Metric("Margin", ".4f", "margin", held_out=True, over="pairs"),
    "chosen_reward": Metric("Chosen reward", ".4f", "chosen", held_out=True, over="pairs"),
    "rejected_reward": Metric("Rejected reward", ".4f", "rejected", held_out=True, over="pairs"),
    "mean_reward": Metric("Mean reward", ".4f", held_out=True, over="completions"),
    "min_reward": Metric("Least reward", ".4f", held_out=True),
    "max_reward": Metric("Greatest reward", ".4f", held_out=True),
    "chosen_logp": Metric("Chosen log-probability", ".2f", held_out=True, over="pairs"),
    "rejected_logp": Metric("Rejected log-probability", ".2f", held_out=True, over="pairs"),
    "chosen_logp_per_token": Metric("Chosen log-probability, nats a token", ".3f", over="pairs"),
    "rejected_logp_per_token": Metric("Rejected log-probability, nats a token", ".3f", over="pairs"),
    "own_logp_per_token": Metric("Log-probability of own answers, nats a token", ".3f", over="answers"),
    "grad_norm": Metric("Gradient norm", short="grad_norm"),
    "learning_rate": Metric("Learning rate", ".2e", "lr"),
    "kl": Metric("KL from the reference, nats an answer", ".3f", held_out=True, over="answers"),
    "kl_error": Metric("Standard error of the KL", ".3f"),
    "kl_per_token": Metric("KL from the reference, nats a token", ".4f", held_out=True, over="answers' tokens"),
    "reward": Metric("Reward", ".3f", "reward", held_out=True, over="answers"),
    "reward_model_accuracy": Metric("Reward model's accuracy", ".3f"),
    "reward_error": Metric("Standard error of the reward", ".3f"),
    "reward_std": Metric("Standard deviation of rewards within a group", ".3f"),
    "frac_reward_zero_std": Metric("Groups whose answers are all worth the same", ".3f"),
    "entropy": Metric("Entropy, nats a token", ".3f", over="answers' tokens"),
    "clip_ratio": Metric("Ratios that the clip bounds", ".4f"),
    "mean_length": Metric("Length of an answer, tokens", ".1f", held_out=True),
    "completions/mean_length": Metric("Length of an answer, tokens", ".1f", "tokens"),
    "completions/clipped_ratio": Metric("Answers that are cut off", ".3f"),
    "sampling/logp_difference_mean": Metric("Sampler against learner, nats a token, mean", ".2e"),
    "sampling/logp_difference_max": Metric("Sampler against learner, nats a token, largest", ".2e"),
    "win_rate": Metric("Win rate over the baseline", ".3f", held_out=True),
    "win_rate_error": Metric("Standard error of the win rate", ".3f"),
    "win_rate_ties": Metric("Ties with the baseline", ".3f"),
    "no_verdict": Metric("Comparisons without a verdict", ".0f"),
    "answer_characters": Metric("Length of an answer, characters", ".1f", held_out=True),
    "answers": Metric("Answers drawn", ".0f"),
    "score": Metric("Mean score of the answers drawn", ".3f", "score"),
    "score_better": Metric("Mean score of better answers", ".3f", "better"),
    "score_worse": Metric("Mean score of worse answers", ".3f", "worse"),
    "tokens_better": Metric("Tokens of a better answer", ".1f", "tokens"),
    "tokens_worse": Metric("Tokens of a worse answer", ".1f", "against"),
    "tokens_per_second": Metric("Tokens drawn a second", ".0f", "tokens/s"),
    "sampling_seconds": Metric("Seconds of drawing answers", ".1f"),
    "judging_seconds": Metric("Seconds of judging them", ".1f"),
    "length_correlation": Metric("Correlation of length difference and margin", ".3f", held_out=True),
    "useful_token_fraction": Metric("Computed tokens that are real", ".3f"),
    "pairs_per_second": Metric("Pairs per second", ".1f"),
    "step_seconds": Metric("Seconds a step", ".3f"),
    "memory_gb": Metric("Peak memory, GB", ".2f"),
}
# Control characters, line separators, turns of the writing direction, and halves of surrogate pairs.
_TURNS = (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = (*range(32), *range(127, 160), 0x2028, 0x2029, *_TURNS, *range(0xD800, 0xE000))
_VISIBLE = {c: 0x2400 + c if c < 32 else 0xFFFD for c in _CONTROLS if chr(c) not in "\n\t"}
_NUMBERS = {*METRICS, "pairs", "tokens", "skipped", "dropped"}  # of a record, that pages count with
HELD_OUT = tuple(name for name, metric in METRICS.items() if metric.held_out)


def metric_of(name: str) -> Metric:
    """How `name` is shown; accuracy/SOURCE is an accuracy."""
    kind = name.partition("/")[0]
    return METRICS.get(name) or METRICS.get(kind) or Metric(kind.replace("_", " "))


def show_metric(name: str, value: float | None) -> str:
    """A metric's value for a person: `show_metric("dpo_loss", 0.69315)` is "0.6931"."""
    return "nan" if value is None or not math.isfinite(value) else format(value, metric_of(name).form)


def printable(text: str) -> str:
    """Make control characters visible: a model's answer may hold escape codes that would drive the terminal.

    Line ends and tabs stay; of a name, which has none, `escaped` leaves neither.
    """
    return text.translate(_VISIBLE)


def best_evaluation(records: Iterable[Record]) -> Record | None:
    """The evaluation with the highest win rate, the first of several, of those after updates; None: there is none."""
    found = [r for r in records if r["split"] == "eval" and r["step"] and r.get("win_rate") is not None]
    return max(found, key=lambda r: (r["win_rate"], -r["step"]), default=None)


def read_records(path: Path, shape: Any = None) -> list[Record]:
    """All records of a JSON-lines file; none if it is missing; a half-written last line is left out.

    Args:
      shape: what every record must be, see `disk.check_shape`; None: any object.

    Raises:
      UserError: the file cannot be read, or a line before the last is not such an object, which no interrupted write
        explains.
    """
    return _parsed(path, _lines(b"\n".join(_pieces(path).values())), shape)


def _parsed(path: Path, lines: Sequence[bytes], shape: Any) -> list[Record]:
    mend = "remove the line, or restore the file"
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            if shape is not None:
                check_shape(record, shape, f"{path} line {number}", mend)
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path} line {number} is not a JSON object; {mend}")
    return records


def read_metrics(path: Path) -> list[Record]:
    """All records of a metrics.jsonl, each of a step and a split, known metrics as numbers; see `read_records`."""
    records = read_records(path, MetricRecord)
    for number, record in enumerate(records, 1):
        for name, value in record.items():
            if isinstance(value, str) and name.partition("/")[0] in _NUMBERS:
                raise UserError(f"{path} line {number}: {name} is a text, must be a number; mend or remove the line")
    return records


def without_nan(record: Mapping[str, Any]) -> Record:
    """The record with None for every number that is not finite."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}


def truncate_records(path: Path, keep: Callable[[Record], bool], shape: Any = None) -> None:
    """Rewrite a JSON-lines file to the records for which `keep` is true, at once or not at all; see `read_records`.

    For resuming: what was written after the checkpoint will be written again. A half-written last line goes too, so
    that the next append starts on a line of its own. A missing file stays missing.
    """
    # Several in a bucket, each of whole lines, so that any of them may be done first.
    for piece, content in _pieces(path).items():
        # The lines' own bytes are kept: only a half-written last one has no record.
        lines = _lines(content)
        records = _parsed(piece, lines, shape)
        kept = b"".join(line + b"\n" for line, record in zip(lines, records, strict=False) if keep(record))
        if kept != content:
            write_whole(piece, kept)


def before_after(records: Iterable[Record]) -> list[tuple[str, float | None, float | None]]:
    """The held-out metrics at step 0 and at the last evaluation after it: (name, before, after); None if not there.

    An accuracy of 0 before training is None too: the policy is its own reference, every pair ties and none is won.
    """
    evals = {record.get("step", 0): record for record in records if record.get("split") == "eval"}
    before = evals.pop(0, {})
    after = evals[max(evals)] if evals else {}
    by_source = sorted(name for name in {**before, **after} if name.startswith(("accuracy/", "margin/")))
    names = [name for name in HELD_OUT if name in before or name in after]
    tied = {name for name, value in before.items() if name.startswith("accuracy") and not value}
    return [(name, None if name in tied else before.get(name), after.get(name)) for name in (*names, *by_source)]


def _pieces(path: Path) -> dict[Path, bytes]:
    try:
        return read_pieces(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); restore or remove it") from None


def _lines(content: bytes) -> list[bytes]:
    return [line for line in content.split(b"\n") if line.strip()]
