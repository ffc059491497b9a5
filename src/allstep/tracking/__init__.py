"""Tracking: what a run tells of itself, on disk and in tools, once for each step however often it is killed.

On the way of a value: `track` takes it from the loop (`values`, `model_values`), `writing` writes it to the `journal`,
and a `delivery` for each tool brings it there. `tracker` says what a tool has to be able to do; `files` and `services`
are those that are ready. Only the main rank writes.

Not here: what is computed over ranks (`allstep.metrics`), and what saves the position (`allstep.checkpoint`).

Training scripts use `allstep.Track`. No tool is imported before it is used.
"""

from allstep.tracking.files import CSV, TensorBoard
from allstep.tracking.services import MLflow, Trackio, WandB
from allstep.tracking.track import Track, send
from allstep.tracking.tracker import Tracker
from allstep.tracking.values import Histogram, Image

__all__ = ["CSV", "Histogram", "Image", "MLflow", "TensorBoard", "Track", "Tracker", "Trackio", "WandB", "send"]
