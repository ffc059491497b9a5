"""`Metrics`: metrics by name, fed with what an engine's step returns and computed over all ranks.

Contract: made from torchmetrics metrics, and attached once to one engine before its run, on every rank alike. During
the run each batch of this rank's own enters every metric once; a rank's fillers and skipped iterations enter none. At
the usage's event the results of all ranks together are in `engine.state.metrics`. What can go wrong: see
`EventReduction`, which reduces; an `update` that raises does so as any handler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers.abstract import WrapperMetric

from allstep.engine import Engine, Events, RemovableEventHandle
from allstep.engine.reader import count_samples
from allstep.errors import MetricError
from allstep.metrics.nodes import Entry, leaves, nodes, syncs_itself, takes_samples
from allstep.metrics.reduction import EventReduction
from allstep.metrics.running import Weighted
from allstep.metrics.saving import load_states, saved_states
from allstep.metrics.usage import Event, Usage, UsageName, as_usage, base_event
from allstep.world import World

Transform = Callable[[Any], Any]


class Metrics:
    """Metrics by name, computed over all ranks in one reduction.

    Args:
        metrics: torchmetrics metrics, collections, allstep's `Mean`, `Sum`, `Max`, `Min`, and arithmetic on any of
            them, by the name that the result gets in `engine.state.metrics`. A collection's results are named
            "name/key"; one that is given alone, "key".

    Raises:
        TypeError: something given is no metric.
    """

    state_differs_by_rank = True  # a checkpoint keeps each rank's

    def __init__(self, metrics: Mapping[str, Entry] | MetricCollection) -> None:
        alone = isinstance(metrics, MetricCollection)
        entries: Mapping[str, Entry] = {"metrics": metrics} if isinstance(metrics, MetricCollection) else metrics
        for name, entry in entries.items():
            if not isinstance(entry, Metric | MetricCollection):
                raise TypeError(f"metric {name!r} is {entry!r}; it must be a torchmetrics Metric or MetricCollection")
        self.entries: dict[str, Entry] = dict(entries)
        self.names_results = not alone
        self.carried: dict[tuple[int, str], list[Any]] = {}
        self._feeds: list[tuple[Transform | None, list[tuple[Entry, bool]]]] = []
        self._engine: Engine | None = None
        self._handles: list[RemovableEventHandle] = []
        self._reduction: EventReduction | None = None

    def attach(
        self,
        engine: Engine,
        output_transform: Transform | Mapping[str, Transform] | None = None,
        usage: Usage | UsageName = "epoch",
        *,
        device: torch.device | str | None = None,
    ) -> Metrics:
        """Feed the metrics with the engine's outputs and compute them at the usage's event.

        Args:
            engine: an engine that is not running; its ranks all attach the same metrics in the same order.
            output_transform: from a step's output to what the metrics take: a tuple of positional arguments, a mapping
                of keyword arguments, of which each metric takes those that it knows, or one argument. None leaves the
                batch out. By default the output itself. A mapping gives some metrics, by name, one of their own.
            usage: when to begin, to take a batch and to compute: "epoch"; "running", over the epoch so far after each
                iteration; "run"; "iteration"; or a `Usage`.
            device: where states are kept; by default the current world's device, else where the metrics are.

        Returns:
            This object.

        Raises:
            MetricError: these metrics are attached already, or the engine is running.
            ValueError: an unknown usage or name, or a name that is taken.
        """
        chosen = as_usage(usage)
        if self._engine is not None:
            raise MetricError("these metrics are attached already; make other ones for another engine or usage")
        if engine.is_running:
            raise MetricError("the engine is running; attach metrics before run(), on every rank alike")
        self._feeds = self._make_feeds(output_transform)
        self._move(device)
        reduction = next((r for r in _reductions(engine) if r.event == chosen.computes), None)
        known = reduction is not None
        reduction = reduction or EventReduction(chosen.computes)
        reduction.join(self)
        add = engine.add_event_handler
        self._handles = [
            add(chosen.resets, self._begin, base_event(chosen.resets)),
            add(chosen.updates, self._take),
        ]
        if known and base_event(chosen.updates) is base_event(chosen.computes):
            engine.remove_event_handler(reduction, chosen.computes)  # it comes after all that it reduces
            add(chosen.computes, reduction)
        elif not known:
            engine.reductions.append(reduction)
            add(chosen.computes, reduction)
        self._engine, self._reduction = engine, reduction
        self._note_own_ways()
        return self

    def detach(self) -> None:
        """Take the metrics off their engine, on every rank alike. Raises MetricError when it is running."""
        engine, reduction = self._engine, self._reduction
        if engine is None or reduction is None:
            return
        if engine.is_running:
            raise MetricError("the engine is running; detach metrics before or after run(), on every rank alike")
        for handle in self._handles:
            handle.remove()
        reduction.leave(self)
        if not reduction.members:
            engine.reductions.remove(reduction)
            engine.remove_event_handler(reduction, reduction.event)
        self._engine = self._reduction = None

    def reset(self) -> None:
        """Forget what was counted on this rank."""
        self.carried.clear()
        for entry in leaves(self.entries.values()):
            entry.reset()
            if isinstance(entry, WrapperMetric):
                entry._update_count = 0

    def state_dict(self) -> dict[str, Any]:
        """What this rank has counted; no other rank is asked. To be saved by each rank for itself."""
        return saved_states(nodes(self.entries), self.carried)

    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on from what `state_dict` gave; no other rank is asked.

        Args:
            state_dict: what this rank saved; or what all ranks of any number saved, in their order, of which this rank
                takes its share, so that what was counted is counted once.

        Raises:
            ValueError: the state is of other metrics; nothing was changed.
        """
        among = World.current() if self._engine is None else self._engine.coordinator
        rank, world_size = (0, 1) if among is None else (among.rank, among.world_size)
        states = [state_dict] if isinstance(state_dict, Mapping) else list(state_dict)[rank::world_size]
        found = nodes(self.entries)
        load_states(found, states, self.carried)

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take this rank's share of what all ranks of a checkpoint saved; see `load_state_dict`."""
        self.load_state_dict(list(states))

    def _begin(self, engine: Engine, event: Event) -> None:
        beginnings: dict[Event, int] = {Events.STARTED: 0, Events.EPOCH_STARTED: engine.progress.epoch_began_at}
        goes_on_from = beginnings.get(event)
        if goes_on_from is None or engine.state.iteration <= goes_on_from:
            self.reset()

    def _take(self, engine: Engine) -> None:
        state = engine.state
        if not state.active or state.samples == 0:
            return
        samples: int | None = state.samples
        for transform, fed in self._feeds:
            output = state.output if transform is None else transform(state.output)
            if output is None:
                continue
            given, named = _arguments(output)
            for entry, weighted in fed:
                known = entry._filter_kwargs(**named) if named and isinstance(entry, Metric) else named
                if weighted:
                    if samples is None:
                        samples = (engine.samples_in or count_samples)(state.batch)
                    known = {**known, "samples": samples}
                entry.update(*given, **known)
                if isinstance(entry, WrapperMetric):  # these do not count
                    entry._update_count += 1

    def _make_feeds(
        self, output_transform: Transform | Mapping[str, Transform] | None
    ) -> list[tuple[Transform | None, list[tuple[Entry, bool]]]]:
        by_name = output_transform if isinstance(output_transform, Mapping) else {}
        common = None if isinstance(output_transform, Mapping) else output_transform
        unknown = sorted(by_name.keys() - self.entries.keys())
        if unknown:
            raise ValueError(f"output_transform names {', '.join(unknown)}; the metrics are {', '.join(self.entries)}")
        own = {id(leaf): by_name[name] for name in by_name for leaf in leaves([self.entries[name]])}
        feeds: dict[int, tuple[Transform | None, list[tuple[Entry, bool]]]] = {}
        for leaf in leaves(self.entries.values()):
            transform = own.get(id(leaf), common)
            feeds.setdefault(id(transform), (transform, []))[1].append((leaf, takes_samples(leaf)))
        return list(feeds.values())

    def _move(self, device: torch.device | str | None) -> None:
        world = World.current()
        target = device if device is not None else None if world is None else world.device
        if target is None:
            return
        for entry in self.entries.values():
            if torch.device(target).type == "mps":  # it has no float64
                for module in entry.modules():
                    if isinstance(module, Weighted):
                        module.set_dtype(torch.float32)
            entry.to(target)

    def _note_own_ways(self) -> None:
        assert self._engine is not None
        for node in nodes(self.entries):
            if syncs_itself(node.metric):
                self._engine.logger.info(
                    "metric %s (%s) reduces its states in a way of its own, with collectives of its own",
                    node.name,
                    type(node.metric).__name__,
                )


def _reductions(engine: Engine) -> list[EventReduction]:
    return [each for each in engine.reductions if isinstance(each, EventReduction)]


def _arguments(output: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """A step's output as the arguments of `update`."""
    if isinstance(output, Mapping):
        return (), output
    if isinstance(output, tuple):
        return output, {}
    return (output,), {}
