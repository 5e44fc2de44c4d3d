"""TensorBoard: an event file with a scalar per key, and the run's events as text."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from isograd._export import Format, key_prefix, points, told_events
from isograd._runs import Run


@dataclass(frozen=True, kw_only=True)
class Tensorboard(Format):
    """One event per step, at the time of the step. TensorBoard keeps float32: what is beyond its range becomes Inf."""

    needs: ClassVar[str] = "tensorboard"

    def write(self, run: Run, folder: Path, *, place: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        writer = EventFileWriter(str(folder))
        try:
            for event in _events(run):
                writer.add_event(event)
        finally:
            writer.close()

    def reading(self, place: Path) -> str:
        return f"tensorboard --logdir {shlex.quote(str(place))}"


def _events(run: Run) -> Iterator[Any]:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    time = 0.0
    for point in points(run):
        time = point.time
        with np.errstate(over="ignore"):
            narrow = np.array(list(point.values.values())).astype(np.float32).tolist()
        values = [Summary.Value(tag=tag, simple_value=v) for tag, v in zip(point.values, narrow, strict=True)]
        yield Event(step=point.step, wall_time=time, summary=Summary(value=values))
    for (subject, step), text in told_events(run).items():
        tag = f"{key_prefix(run, subject)}events"
        yield Event(step=step, wall_time=time, summary=Summary(value=[_text(tag, text)]))


def _text(tag: str, text: str) -> Any:
    """A summary of TensorBoard's text plugin, whose tensors are strings."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape)
    return Summary.Value(
        tag=tag,
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
        tensor=tensor,
    )
