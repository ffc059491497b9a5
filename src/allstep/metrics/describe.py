"""What is reduced over ranks, as lines that ranks compare before anything is reduced.

Contract: a `Schema` lists every state in the order in which it is packed. Behind the states it says, in lines without
one, what else has to be the same: how metrics were made and when they are fed. Two ranks may reduce together exactly
when their schemas are equal. `coordination.compare` does the comparing; the words for a difference are here.

`descriptions` gives the text of how metrics were made, which the shapes of states do not show. Ranks of one script give
the same text: of a metric its class and the arguments that torchmetrics' or allstep's own classes were made with, of
arithmetic its formula, of functions the name. What a rank may well have of its own is left out: devices, paths,
tensors, a user's own arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias

import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.metric import CompositionalMetric

from allstep.coordination import by_ranks
from allstep.errors import MetricMismatchError
from allstep.metrics.nodes import Entry, init_arguments, named_metrics, plain_attributes
from allstep.metrics.torchmetrics_private import bookkeeping, is_library_class, is_library_module, state_defaults

_MISSING = object()
_LONGEST = 200  # characters of a text

# How a metric computes, and not what: a rank may have these for itself.
_LEFT_OUT = frozenset(
    {
        *("validate_args", "verbose", "num_threads", "batch_size", "num_workers", "progress_bar", "rank"),
        *("process_group", "sync_on_compute", "compute_on_cpu", "dist_sync_on_step", "compute_with_cache"),
        *("warn_on_many_detections", "model_name_or_path"),
    }
)


class StateLine(NamedTuple):
    """One state: at which event and in which metric, by what name, and how it is reduced, with type and shape.

    A line whose state is "" is about the metric itself.
    """

    event: str
    metric: str
    state: str
    form: str

    def difference(self, at: int, lines: Sequence[StateLine | None]) -> MetricMismatchError:
        """The error for ranks that differ in the line at place `at`, named by metric, state and ranks."""
        return MetricMismatchError(
            f"ranks reduce different metrics: {_told(at, lines)}. Attach the same metrics, made with the same "
            "arguments, in the same order on every rank"
        )


Schema: TypeAlias = tuple[StateLine, ...]


def _told(at: int, lines: Sequence[StateLine | None]) -> str:
    known = [line for line in lines if line is not None]
    if len(known) == len(lines) and len({line[:3] for line in known}) == 1:
        said = by_ranks([line.form for line in known])
        state = f", state {known[0].state!r}" if known[0].state else ""
        return f"metric {known[0].metric!r}{state}, at {known[0].event}, is {said}"
    if any(line.state for line in known):
        return f"state number {at + 1} is {by_ranks([_state(line) for line in lines])}"
    return f"there is {by_ranks([_metric(line) for line in lines])}"


def _state(line: StateLine | None) -> str:
    if line is None or not line.state:
        return "no further state"
    return f"metric {line.metric!r}, state {line.state!r}, at {line.event}"


def _metric(line: StateLine | None) -> str:
    return "no further metric" if line is None else f"metric {line.metric!r}, {line.form}, at {line.event},"


# How metrics were made


def descriptions(entries: Mapping[str, Entry]) -> list[tuple[str, str]]:
    """Of each collection and metric inside of named entries, the name and how it was made."""
    metrics = named_metrics(entries)
    names = {id(metric): name for name, metric in metrics}
    found = [(name, _collection(entry)) for name, entry in entries.items() if isinstance(entry, MetricCollection)]
    return [*found, *((name, _description(metric, names)) for name, metric in metrics)]


def _collection(collection: MetricCollection) -> str:
    members = ", ".join(map(str, collection.keys(keep_base=True)))
    return f"a collection, prefix {collection.prefix!r}, postfix {collection.postfix!r}, of {members}"


def _description(metric: Metric, names: Mapping[int, str]) -> str:
    if isinstance(metric, CompositionalMetric):
        return f"the formula {_formula(metric, names)}"
    made = [
        f"{name}={text}" for name in _compared(metric) if (text := _text(vars(metric).get(name, _MISSING))) is not None
    ]
    return f"{type(metric).__name__}({', '.join(made)})"


def _formula(metric: CompositionalMetric, names: Mapping[int, str]) -> str:
    operands = [_operand(each, names) for each in (metric.metric_a, metric.metric_b) if each is not None]
    return f"{_operator(metric.op)}({', '.join(operands)})"


def _operand(operand: Any, names: Mapping[int, str]) -> str:
    if isinstance(operand, CompositionalMetric):
        return _formula(operand, names)
    if isinstance(operand, Metric):
        return names[id(operand)]
    if isinstance(operand, torch.Tensor):
        # Reading a number from an accelerator would wait for it.
        on_host = operand.ndim == 0 and operand.device.type == "cpu"
        return repr(operand.item()) if on_host else f"tensor of shape {tuple(operand.shape)}"
    return _text(operand) or type(operand).__name__


def _operator(function: Any) -> str:
    """A function's name, with what torchmetrics bound to it: the index of `metric[2]`."""
    name = str(getattr(function, "__name__", type(function).__name__))
    # A user's closure may hold anything of its rank's own.
    if not is_library_module(str(getattr(function, "__module__", ""))):
        return name
    bound = [_text(cell.cell_contents) for cell in getattr(function, "__closure__", None) or ()]
    return " ".join([name, *(text for text in bound if text is not None)])


def _compared(metric: Metric) -> list[str]:
    """The arguments of torchmetrics' and allstep's own classes that a metric is made of, as attributes."""
    kinds = [kind for kind in type(metric).__mro__ if is_library_class(kind)]
    names = list(dict.fromkeys(name for kind in kinds for name in init_arguments(kind)))
    if type(metric).__module__.partition(".")[0] == "allstep":  # some are kept under other names
        names += [
            name
            for name in sorted(plain_attributes(metric, bookkeeping().union(state_defaults(metric))))
            if name not in names
        ]
    return [name for name in names if name not in _LEFT_OUT and not name.startswith("_") and "device" not in name]


def _text(value: Any) -> str | None:
    """A value as text that is the same on all ranks; None for what may not be."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, Enum):
        return _text(value.value)
    if isinstance(value, Integral):
        return repr(int(value))
    if isinstance(value, Real):
        return repr(float(value))
    if isinstance(value, str):
        # Where files are may differ from machine to machine, and long texts are data.
        is_path = "/" in value or "\\" in value or ":" in value
        return None if is_path or len(value) > _LONGEST else repr(str(value))
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, list | tuple):
        return _joined("[{}]", [_text(each) for each in value])
    if isinstance(value, set | frozenset):
        texts = [_text(each) for each in value]
        return None if None in texts else _joined("{{{}}}", sorted(text for text in texts if text is not None))
    if isinstance(value, partial):
        return _text(value.func)
    if inspect.isroutine(value) or inspect.isclass(value):
        return str(value.__qualname__)
    return None


def _joined(form: str, texts: list[str | None] | list[str]) -> str | None:
    known = [text for text in texts if text is not None]
    return form.format(", ".join(known)) if len(known) == len(texts) else None
