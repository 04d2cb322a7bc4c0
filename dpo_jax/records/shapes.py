"""What the files of a run hold, as far as they are read again: shapes for `disk.check_shape`. No JAX.

Nearly every key may be missing: other versions wrote these files, and pages leave out what is not there.
"""

from typing import Annotated, NotRequired, Required

from annotated_types import Interval
from typing_extensions import TypedDict

# Bounds keep a number drawable: between two of them lie no infinite distances.
Number = Annotated[float, Interval(ge=-1e30, le=1e30)]
Count = Annotated[int, Interval(ge=0, le=2**53)]
Metric = Number | None  # None: it was not finite
Counts = dict[str, Count]
SavedKeys = dict[str, bool | Number | str | None]  # config.json


class MetricRecord(TypedDict, extra_items=Metric):
    """A line of metrics.jsonl: metrics by their names, beside what they are of."""

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


class RoundPair(TypedDict):
    """A line of a round's file: token ids of the prompt, the better and the worse answer."""

    prompt_token_ids: list[Count]
    token_ids_a: list[Count]
    token_ids_b: list[Count]


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
    read: Required[Count]
    kept: Required[Count]
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
