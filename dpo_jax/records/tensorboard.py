"""TensorBoard's event files: a copy of a run's records."""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary


def open_events(directory: Path, records: Sequence[Mapping[str, Any]]) -> EventsWriter:
    """A TensorBoard writer whose directory holds exactly `records`: old event files are replaced.

    A stopped run leaves events past the checkpoint it resumes from, and a killed one lacks those not yet flushed.
    TensorBoard's own remedy, `purge_step`, drops every tag from that step on: with two phases that both count from 1 it
    would take the SFT curve with it. So the file is made anew from the records, with the times of the old events.
    """
    times: dict[tuple[str, int], float] = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        times |= _event_times(path)
        path.unlink()
    directory.mkdir(parents=True, exist_ok=True)
    # The writer without tensorboardX's thread: where the disk is full that dies, and whoever writes waits for ever.
    writer = EventsWriter(str(directory / "events"))
    now = time.time()
    for record in records:
        add_event(writer, record, times.get((record["split"], record["step"]), now))
    return writer


def add_event(writer: EventsWriter, record: Mapping[str, Any], when: float) -> None:
    """A record's numbers as one event, tagged `split/name`; None is written as nan."""
    values = [
        Summary.Value(tag=f"{record['split']}/{name}", simple_value=math.nan if value is None else value)
        for name, value in record.items()
        if name != "step" and not isinstance(value, str)
    ]
    writer.write_event(Event(wall_time=when, step=record["step"], summary=Summary(value=values)))


def _event_times(path: Path) -> dict[tuple[str, int], float]:
    """When each (split, step) of an event file was written."""
    import grain  # slow to import, and only a run that is opened again has such files

    times: dict[tuple[str, int], float] = {}
    # A file ends in the middle of an event where its writer was killed, and a disk may have damaged it: the times up
    # to there are enough, and the file is about to be replaced.
    with contextlib.suppress(Exception):
        for body in grain.experimental.TFRecordIterDataset(str(path)):
            event = Event.FromString(body)
            times |= {(value.tag.split("/")[0], event.step): event.wall_time for value in event.summary.value}
    return times
