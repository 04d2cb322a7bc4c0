"""TensorBoard's event files: a copy of a run's records."""

import math
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
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
        for event in read_events(path):
            times |= {(value.tag.split("/")[0], event.step): event.wall_time for value in event.summary.value}
        path.unlink()
    directory.mkdir(parents=True, exist_ok=True)
    # The writer without tensorboardX's thread: where the disk is full that dies, and whoever writes waits for ever.
    writer = EventsWriter(str(directory / "events"))
    now = time.time()
    for record in records:
        add_event(writer, record, times.get((record["split"], record["step"]), now))
    return writer


def read_events(path: Path) -> Iterator[Event]:
    """The events of a TensorBoard file, up to where a killed writer left it."""
    data = path.read_bytes()
    at = 0
    while at + 12 <= len(data):
        # A record is: length (8 bytes), its checksum (4), the event, its checksum (4).
        (length,) = struct.unpack_from("<Q", data, at)
        body = data[at + 12 : at + 12 + length]
        if len(body) < length:
            return
        try:
            yield Event.FromString(body)
        except DecodeError:
            return
        at += length + 16


def add_event(writer: EventsWriter, record: Mapping[str, Any], when: float) -> None:
    """A record's numbers as one event, tagged `split/name`; None is written as nan."""
    values = [
        Summary.Value(tag=f"{record['split']}/{name}", simple_value=math.nan if value is None else value)
        for name, value in record.items()
        if name != "step" and not isinstance(value, str)
    ]
    writer.write_event(Event(wall_time=when, step=record["step"], summary=Summary(value=values)))
