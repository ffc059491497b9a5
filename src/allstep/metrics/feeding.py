"""What is fed with a batch, and which of a step's outputs it takes.

Contract: made once from the metrics of one `Metrics`. Every metric inside takes each batch once, however often it
occurs: torchmetrics' `p * r / (p + r)` would feed p and r twice, and so would a collection beside one of its members.
So collections, arithmetic and wrappers that only pass on what they are given are taken apart, and of members that hold
the same states one is fed. Where two that are fed would both feed a metric inside of them, `Feeding` raises. What can
be decided before the first batch is decided when it is made, so that a batch costs little beside the updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from numbers import Real
from typing import Any

import numpy as np
import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.metric import CompositionalMetric
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric
from torchmetrics.wrappers.abstract import WrapperMetric

from allstep.errors import ArgumentError, ArgumentTypeError, MetricError
from allstep.metrics.nodes import Entry, wrapped_metrics
from allstep.metrics.running import Weighted
from allstep.metrics.torchmetrics_private import set_update_count, sorts_keywords_itself
from allstep.parallel import is_dtensor

Transform = Callable[[Any], Any]

_PASS_ON = (MetricCollection.update, CompositionalMetric.update, ClasswiseWrapper.update, MinMaxMetric.update)
_VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


@dataclass(frozen=True, slots=True, eq=False)
class FedMetric:
    """Something whose `update` is called with each batch.

    Attributes:
        name: of the entry that it is, or is part of.
        entry: what is fed.
        keywords: the keyword arguments that it knows; None when it sorts them out for itself.
        weighted: whether it is told how many samples a batch has.
        is_counted_here: whether its batches are counted here, since torchmetrics does not count those of wrappers.
    """

    name: str
    entry: Entry
    keywords: frozenset[str] | None
    weighted: bool
    is_counted_here: bool

    def known(
        self, arguments: Sequence[Any], named: Mapping[str, Any], samples: Callable[[], int]
    ) -> Mapping[str, Any]:
        """Of keyword arguments those that it takes, and how many samples the batch has, where it is weighted.

        Args:
            arguments: positional arguments.
            named: keyword arguments.
            samples: what counts the batch's samples.

        Raises:
            ArgumentTypeError: the second of two arguments for a weighted value is no number of samples.
        """
        known = named
        if named and self.keywords is not None:
            known = {key: value for key, value in named.items() if key in self.keywords}
        if self.weighted and not self._is_told_samples(arguments, known):
            known = {**known, "samples": samples()}
        return known

    def note(self, arguments: Sequence[Any], known: Mapping[str, Any], named: Mapping[str, Any]) -> str:
        """Which metric this is and what it was given, for an error that its update raised."""
        kinds = [*map(_kind, arguments), *(f"{key}={_kind(value)}" for key, value in known.items())]
        left_out = [key for key in named if key not in known]
        beside = f"; the output has {', '.join(left_out)} too, which it does not know" if left_out else ""
        if any(map(is_dtensor, (*arguments, *known.values()))):
            beside += "; a metric takes no DTensor, so give it allstep.parallel.whole_tensor(value)"
        return f"(metric {self.name!r}, {type(self.entry).__name__}, was given ({', '.join(kinds)}){beside})"

    def _is_told_samples(self, arguments: Sequence[Any], known: Mapping[str, Any]) -> bool:
        """Whether the output itself says how many samples its value stands for."""
        if len(arguments) > 1:
            if not _is_count(arguments[1]):
                raise ArgumentTypeError(
                    f"metric {self.name!r}: {type(self.entry).__name__} takes one value, and the number of samples "
                    f"that it stands for; it was given {len(arguments)} arguments, the second a "
                    f"{type(arguments[1]).__name__}. Give it an output_transform of its own"
                )
            return True
        return "samples" in known and _is_count(known["samples"])


class Feeding:
    """What of some metrics is fed, and how a step's output reaches it.

    Args:
        entries: metrics and collections by name.
        transforms: from a step's output to what a metric takes, for all of them or by name; None gives the output.
        leaders: for metrics whose states another one holds too, that one, by id.

    Attributes:
        weighs: whether anything is told how many samples a batch has.

    Raises:
        ArgumentError: a transform is for a name that there is not.
        MetricError: a metric would be fed twice, or differently under two names.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        transforms: Transform | Mapping[str, Transform] | None,
        leaders: Mapping[int, Metric],
    ) -> None:
        by_name = transforms if isinstance(transforms, Mapping) else {}
        common = None if isinstance(transforms, Mapping) else transforms
        unknown = sorted(by_name.keys() - entries.keys())
        if unknown:
            raise ArgumentError(f"output_transform names {', '.join(unknown)}; the metrics are {', '.join(entries)}")
        to_feed = _entries_to_feed(entries, leaders)
        _check_fed_once(to_feed)
        # Metrics with one transform are fed together, so that it is called once a batch.
        groups: dict[int, tuple[Transform | None, list[FedMetric]]] = {}
        for names, entry in to_feed.values():
            own = {id(by_name[name]): by_name[name] for name in names if name in by_name}
            if len(own) > 1:
                raise MetricError(
                    f"a {type(entry).__name__} is part of metrics {' and '.join(names)}, for which output_transform "
                    "has different functions; make a metric for each"
                )
            transform = next(iter(own.values()), common)
            weighted = any(isinstance(module, Weighted) for module in entry.modules())
            keywords = _keywords(entry)
            takes_samples = weighted and (keywords is None or "samples" in keywords)
            fed = FedMetric(names[0], entry, keywords, takes_samples, isinstance(entry, WrapperMetric))
            groups.setdefault(id(transform), (transform, []))[1].append(fed)
        self._groups = tuple(groups.values())
        self.weighs = any(fed.weighted for _, group in self._groups for fed in group)

    def take(self, output: Any, samples: Callable[[], int]) -> None:
        """Update all with a step's output, without its graph; a transform that gives None leaves it out.

        Args:
            output: what the step returned.
            samples: counts the batch's samples; it is called at most once, and only for what is weighed.

        Raises:
            Exception: what an `update` raises, with a note of which metric it was and what it was given.
        """
        # Counting may walk through the batch, so it is done once, and not at all where nobody asks.
        if self.weighs:
            samples = cache(samples)
        for transform, group in self._groups:
            result = output if transform is None else transform(output)
            if result is None:
                continue
            arguments, named = _arguments(result)
            for fed in group:
                known = fed.known(arguments, named, samples) if named or fed.weighted else named
                try:
                    fed.entry.update(*arguments, **known)
                except Exception as error:
                    error.add_note(fed.note(arguments, known, named))
                    raise
                if fed.is_counted_here and isinstance(fed.entry, WrapperMetric):
                    set_update_count(fed.entry, fed.entry.update_count + 1)

    def reset_wrapper_counts(self) -> None:
        """Have wrappers, whose own `reset` may leave it, say that they took no batch."""
        for _, group in self._groups:
            for fed in group:
                if isinstance(fed.entry, WrapperMetric):
                    set_update_count(fed.entry, 0)


def _entries_to_feed(entries: Mapping[str, Entry], leaders: Mapping[int, Metric]) -> dict[int, tuple[list[str], Entry]]:
    """What is fed, by its id, with the names of the entries that it is part of."""
    found: dict[int, tuple[list[str], Entry]] = {}
    for name, entry in entries.items():
        for part in _parts(entry):
            leader: Entry = leaders.get(id(part), part)
            names = found.setdefault(id(leader), ([], leader))[0]
            if name not in names:
                names.append(name)
    return found


def _parts(entry: Entry) -> Iterator[Entry]:
    """What of an entry is fed for itself."""
    if getattr(type(entry), "update", None) in _PASS_ON:
        for inner in wrapped_metrics(entry):
            yield from _parts(inner)
    else:
        yield entry


def _check_fed_once(fed: Mapping[int, tuple[Sequence[str], Entry]]) -> None:
    # Two entries may hold one metric only where they are fed as one: each would update it with every batch.
    owners: dict[int, tuple[Sequence[str], Entry]] = {}
    for names, entry in fed.values():
        for module in entry.modules():
            if not isinstance(module, Metric):
                continue
            before, other = owners.setdefault(id(module), (names, entry))
            if other is not entry:
                raise MetricError(
                    f"one {type(module).__name__} is in {type(other).__name__} of metric {before[0]!r} and in "
                    f"{type(entry).__name__} of metric {names[0]!r}; both would feed it with each batch. Give one of "
                    "them a metric of its own, such as metric.clone()"
                )


def _keywords(entry: Entry) -> frozenset[str] | None:
    """Keyword arguments that an update knows; those of a wrapper that takes any are those of what it wraps."""
    if not isinstance(entry, Metric) or sorts_keywords_itself(entry):
        return None
    parameters = signature(entry.update).parameters.values()
    named = frozenset(each.name for each in parameters if each.kind not in _VARIABLE)
    if all(each.kind is not Parameter.VAR_KEYWORD for each in parameters):
        return named
    inner = [_keywords(each) for each in wrapped_metrics(entry)] if isinstance(entry, WrapperMetric) else []
    # A wrapper passes what it is given on, so that it takes what all that it wraps take.
    if not inner:
        return None
    return named.union(*(keys for keys in inner if keys is not None)) if None not in inner else None


def _is_count(value: Any) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.ndim == 0
    return isinstance(value, Real) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    """What a value is, for errors."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def _arguments(output: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """A step's output as the arguments of `update`, without graphs, which metrics that keep these would keep too."""
    if isinstance(output, tuple):
        return [_detached(each) for each in output], {}
    if isinstance(output, Mapping):
        return (), {key: _detached(each) for key, each in output.items()}
    return (_detached(output),), {}


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach() if value.requires_grad else value
    # A named tuple is made of its fields one by one, and is left as it is.
    if type(value) in (list, tuple):
        return type(value)(map(_detached, value))
    return {key: _detached(each) for key, each in value.items()} if isinstance(value, Mapping) else value
