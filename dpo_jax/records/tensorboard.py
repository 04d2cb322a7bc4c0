"""TensorBoard's event files: a copy of a run's records."""

import contextlib
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from dpo_jax.bucket.path import BucketPath
from dpo_jax.bucket.tree import replace_objects

UPLOAD_SECONDS = 60.0  # between uploads of a run's events to a bucket


class BucketEvents:
    """A TensorBoard writer for a directory in a bucket: a local file that is uploaded now and then, and at the end."""

    def __init__(self, directory: BucketPath):
        self._directory, self._uploaded, self._grown = directory, -math.inf, True
        self._local = tempfile.TemporaryDirectory(prefix="dpo_jax-tensorboard-")
        self._writer = EventsWriter(str(Path(self._local.name) / "events"))

    def write_event(self, event: Event) -> None:
        """Add an event."""
        self._writer.write_event(event)
        self._grown = True

    def flush(self) -> None:
        """Upload the events, if the last time was a while ago."""
        self._writer.flush()
        if self._grown and time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            replace_objects(Path(self._local.name), self._directory, last=())
            self._uploaded, self._grown = time.monotonic(), False

    def close(self) -> None:
        """Upload all of them."""
        self._uploaded = -math.inf
        try:
            self.flush()
        finally:
            self._writer.close()
            self._local.cleanup()


def open_events(directory: Path, records: Sequence[Mapping[str, Any]]) -> EventsWriter | BucketEvents:
    """A TensorBoard writer whose directory holds exactly `records`: old event files are replaced.

    A stopped run leaves events past the checkpoint it resumes from, and a killed one lacks those not yet flushed.
    TensorBoard's own remedy, `purge_step`, drops every tag from that step on: with two phases that both count from 1 it
    would take the SFT curve with it. So the file is made anew from the records, with the times of the old events.
    """
    times: dict[tuple[str, int], float] = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        times |= _event_times(path)
        if not isinstance(path, BucketPath):  # there the new ones take their place when they are uploaded
            path.unlink()
    directory.mkdir(parents=True, exist_ok=True)
    # The writer without tensorboardX's thread: where the disk is full that dies, and whoever writes waits for ever.
    writer = BucketEvents(directory) if isinstance(directory, BucketPath) else EventsWriter(str(directory / "events"))
    now = time.time()
    for record in records:
        add_event(writer, record, times.get((record["split"], record["step"]), now))
    return writer


def add_event(writer: EventsWriter | BucketEvents, record: Mapping[str, Any], when: float) -> None:
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
    with contextlib.suppress(Exception), tempfile.TemporaryDirectory() as copies:
        if isinstance(path, BucketPath):
            copy = Path(copies) / "events"
            copy.write_bytes(path.read_bytes())
            path = copy
        for body in grain.experimental.TFRecordIterDataset(str(path)):
            event = Event.FromString(body)
            times |= {(value.tag.split("/")[0], event.step): event.wall_time for value in event.summary.value}
    return times
