"""What the files of a run hold, as far as they are read again: shapes for `disk.check_shape`. No JAX.

Nearly every key may be missing: other versions wrote these files, and pages leave out what is not there.
"""

from typing import Annotated, NotRequired, Required

from annotated_types import Interval, MinLen
from typing_extensions import TypedDict

# Far beyond float32, in which a run computes; and so that no distance between two of them is infinite on a page.
Number = Annotated[float, Interval(ge=-1e100, le=1e100)]
Count = Annotated[int, Interval(ge=0, le=2**53)]
Metric = Number | None  # None: it was not finite
Counts = dict[str, Count]
TokenId = Annotated[int, Interval(ge=0, lt=2**31)]
RoundAbout = dict[str, Metric]  # of a round, beside its pairs
SavedKeys = dict[str, bool | Number | str | None]  # config.json


class MetricRecord(TypedDict, extra_items=Metric | str):  # type: ignore[call-arg]  # PEP 728
    """A line of metrics.jsonl: metrics by their names, beside what they are of; texts are of other versions."""

    step: Count
    split: str
    round: NotRequired[str]
    stage: NotRequired[str]


class Event(TypedDict):
    """A line of events.jsonl."""

    step: Count
    split: str


class Sample(TypedDict):
    """A line of samples.jsonl."""

    when: str
    step: Count
    mode: str
    prompt: str
    answer: str
    chosen: NotRequired[str]
    rejected: NotRequired[str]


class HeldRecords(TypedDict):
    """How many records a file holds, and which."""

    records: Count
    digest: str


class MadeWith(TypedDict):
    """made_with.json of a checkpoint: its number, the config, and the records that were there, by file."""

    step: Count
    config: NotRequired[SavedKeys]
    records: NotRequired[dict[str, HeldRecords]]


class SourceFile(TypedDict):
    """A data file of identity.json."""

    bytes: int
    digest: str


class SourceFiles(TypedDict):
    """A source of identity.json."""

    files: list[SourceFile]


class IdentityData(TypedDict, total=False):
    """The pairs of identity.json."""

    template_date: str | None
    sources: list[SourceFiles]


class Identity(TypedDict, total=False):
    """identity.json: the files, the pairs and the config that a run was begun with."""

    data: IdentityData
    config: SavedKeys


class RoundCounts(TypedDict):
    """Answers of a block, their tokens, and how many have a score."""

    answers: Count
    tokens: Count
    scored: Count


class RoundPair(TypedDict):
    """A line of a round's file: token ids of the prompt, the better and the worse answer."""

    prompt_token_ids: list[TokenId]
    token_ids_a: list[TokenId]
    token_ids_b: list[TokenId]


class RoundLine(RoundPair):
    """The same while a round is collected, with what its record is made of."""

    score_a: Metric
    score_b: Metric
    tokens_a: Count
    tokens_b: Count


class RoundBlock(TypedDict):
    """A block of prompts of a round that is being collected."""

    lines: list[RoundLine]
    dropped: Counts
    counts: RoundCounts
    score: Number
    sampling_seconds: Number
    judging_seconds: Number


class SavedRowShape(TypedDict):
    """A row shape of row_shapes.json."""

    prompt: Count
    completions: Annotated[list[Count], MinLen(1)]
    rows: Count
    places: Count


class SavedLadder(TypedDict):
    """The shapes from a rollout on."""

    rollout: Count
    shapes: list[SavedRowShape]
    home: list[SavedRowShape]


class SavedLadders(TypedDict):
    """row_shapes.json."""

    changes: list[SavedLadder]


class StageDone(TypedDict):
    """A stage of stages.json: digests of what it was made of, and of its export."""

    made_of: dict[str, str]
    export: str


class RowShapeEntry(TypedDict):
    """A row shape of run.json."""

    rows: Count
    widths: list[Count]


class HubCommit(TypedDict):
    """Where something came from on the hub."""

    repository: str
    commit: str


class RunAbout(TypedDict, total=False):
    """run.json: with what a run is made."""

    versions: dict[str, str]
    platform: str
    device: str
    devices: Count
    processes: Count
    mesh: Counts
    parameters: Count
    trained_parameters: Count
    compute_dtype: str
    steps: Count
    steps_per_epoch: Number
    rows: list[RowShapeEntry]
    hub: dict[str, HubCommit]


class PairScores(TypedDict, total=False):
    """scores.json: of every held-out pair at the last evaluation of a reward model."""

    chosen: list[Metric]
    rejected: list[Metric]


class Longer(TypedDict):
    """How often an answer of a pair is the longer one."""

    chosen: Number
    rejected: Number
    mean_difference: Number


class Histogram(TypedDict):
    """Counts in bins of `width`, the first from `start` on."""

    start: Annotated[int, Interval(ge=-(2**53), le=2**53)]
    width: Annotated[int, Interval(ge=1, le=2**53)]
    counts: list[Count]


class Histograms(TypedDict):
    """The tokens of each part, and of chosen less rejected."""

    prompt: Histogram
    chosen: Histogram
    rejected: Histogram
    difference: Histogram


class SplitReport(TypedDict, total=False):
    """A split of data.json."""

    pairs: Required[Count]
    longer: Longer
    tokens: dict[str, dict[str, Number]]
    histograms: Histograms


class SourceReport(TypedDict, total=False):
    """A source of data.json."""

    name: Required[str]
    split: Required[str]
    read: Count
    kept: Count
    dropped: Counts
    truncated: Counts
    files: list[str]


class MixturePart(TypedDict):
    """A part of a mixture in data.json."""

    name: str
    weight: Number
    epoch: Count
    pairs: Count


class DataReport(TypedDict, total=False):
    """data.json: what became of the raw rows."""

    prompt_format: str
    held_out: str | None
    mixture: list[MixturePart]
    sources: list[SourceReport]
    splits: dict[str, SplitReport]
