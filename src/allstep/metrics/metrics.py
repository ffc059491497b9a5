"""`Metrics`: metrics by name, fed with what an engine's step returns and computed over all ranks.

Contract: made from torchmetrics metrics that have taken nothing in, and attached once to one engine before its run, on
every rank alike. During the run each batch of this rank's own enters every metric once; a rank's fillers and skipped
iterations enter none. At the usage's event the results of all ranks together are in `engine.state.metrics`. What can go
wrong: see `EventReduction`, which reduces; an `update` that raises does so as any handler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchmetrics import Metric, MetricCollection, MetricTracker

from allstep.engine import Engine, Events, RemovableEventHandle
from allstep.errors import ArgumentError, ArgumentTypeError, MetricError
from allstep.metrics.describe import descriptions
from allstep.metrics.feeding import Feeding, Transform
from allstep.metrics.nodes import Entry, MetricSet, apply_compute_groups, collections_in, metric_set, named_metrics
from allstep.metrics.reduction import EventReduction
from allstep.metrics.running import Weighted
from allstep.metrics.saving import load_states, saved_states
from allstep.metrics.torchmetrics_private import overrides_sync, prepare_to_compute
from allstep.metrics.usage import Event, Usage, UsageName, as_usage, base_event, each_event, event_name
from allstep.world import World, current_data_ranks

_LONGEST_NAME = 100


class Metrics:
    """Metrics by name, computed over all ranks in one reduction.

    Args:
        metrics: torchmetrics metrics, collections, allstep's `Mean`, `Sum`, `Max`, `Min`, and arithmetic on any of
            them, by the name that the result gets in `engine.state.metrics`. A collection's results are named
            "name/key"; one that is given alone, "key".

    Raises:
        ArgumentTypeError: something given is no metric.
        ArgumentError: two metrics, one inside of a collection or wrapper, have one name.
    """

    state_differs_by_rank = True  # a checkpoint keeps each rank's

    def __init__(self, metrics: Mapping[str, Entry] | MetricCollection) -> None:
        alone = isinstance(metrics, MetricCollection)
        entries: Mapping[str, Entry] = {"metrics": metrics} if isinstance(metrics, MetricCollection) else metrics
        # Checked before anything looks inside, whose errors would not name the entry.
        for name, entry in entries.items():
            _check_is_metric(name, entry)
        _check_names(entries)
        self._set: MetricSet = metric_set(entries, names_results=not alone)
        self._descriptions = descriptions(entries)
        self._feeding: Feeding | None = None
        self._saved: list[Mapping[str, Any]] | None = (
            None  # given before `attach`, which says which share is this rank's
        )
        self._engine: Engine | None = None
        self._taken_until = 0  # the last iteration that is in the states
        self._handles: list[RemovableEventHandle] = []
        self._reductions: list[EventReduction] = []

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What was given, by name."""
        return self._set.entries

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
            MetricError: these metrics, or one inside, are attached already; one would be fed twice; one overrides how
                torchmetrics synchronises, over several ranks; or the engine is running.
            ArgumentError: an unknown usage or name, or a name that is taken.
            ArgumentTypeError: what a usage names is no event.
        """
        chosen, entries = as_usage(usage), self.entries
        if self._engine is not None:
            raise MetricError("these metrics are attached already; make other ones for another engine or usage")
        if engine.is_running:
            raise MetricError("the engine is running; attach metrics before run(), on every rank alike")
        if engine.coordinator.world_size > 1:
            _check_reducible(self._set)
        # What can be refused is refused before anything is changed: an error leaves the metrics as they were.
        feeding = Feeding(entries, output_transform, self._set.leaders)
        known = [each for each in engine.extension.reductions if isinstance(each, EventReduction)]
        self._check_fed_by_nobody_else(known)
        joined = [_reduction_at(event, known) for event in each_event(chosen.computes)]
        for reduction in joined:
            reduction.check_joins(self._set)
        for collection in collections_in(entries.values()):
            apply_compute_groups(collection, self._set.leaders)
        for _, metric in named_metrics(entries):
            prepare_to_compute(metric)
        # After grouping: members that share states are moved with the tensors they will have.
        self._move(device)
        self._set.compared = [*self._descriptions, (", ".join(entries), _times(chosen))]
        self._engine, self._feeding, self._reductions = engine, feeding, joined
        if feeding.weighs:
            engine.extension.count_samples()
        engine.extension.add_state(self, _name_in_checkpoints(entries))
        self._handles = [
            *(engine.add_event_handler(event, self._begin, base_event(event)) for event in each_event(chosen.resets)),
            engine.add_event_handler(chosen.updates, self._take),
        ]
        for reduction in joined:
            self._join(reduction, chosen.updates)
        # Loaded before it was known how many ranks there are; now this rank takes its share of what all had.
        if self._saved is not None:
            self.load_state_dict(self._saved)
        self._log_unused_options()
        return self

    def detach(self) -> None:
        """Take the metrics off their engine, on every rank alike. Raises MetricError when it is running."""
        engine = self._engine
        if engine is None:
            return
        if engine.is_running:
            raise MetricError("the engine is running; detach metrics before or after run(), on every rank alike")
        engine.extension.remove_state(self)
        for handle in self._handles:
            handle.remove()
        for reduction in self._reductions:
            reduction.leave(self._set)
            if not reduction.members:
                engine.extension.reductions.remove(reduction)
                engine.remove_event_handler(reduction, reduction.event)
        self._engine, self._reductions = None, []

    def reset(self) -> None:
        """Forget what was counted on this rank."""
        self._taken_until = 0
        self._set.unmerged.clear()
        for entry in self.entries.values():
            entry.reset()
        if self._feeding is not None:
            self._feeding.reset_wrapper_counts()

    def state_dict(self) -> dict[str, Any]:
        """What this rank has counted; no other rank is asked. To be saved by each rank for itself."""
        return saved_states(self._set)

    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on from what `state_dict` gave, before or after `attach`; no other rank is asked.

        Args:
            state_dict: what this rank saved; or what all ranks of any number saved, in their order, of which this rank
                takes its share, so that what was counted is counted once. Before `attach`, which says how many ranks
                there are, the share is that of the current world's rank, and is taken anew then.

        Raises:
            ArgumentError: the state is of other metrics; nothing was changed.
        """
        every = [state_dict] if isinstance(state_dict, Mapping) else list(state_dict)
        share = every if isinstance(state_dict, Mapping) else every[slice(*self._share())]
        load_states(self._set, share, every)
        self._taken_until = 0
        # One mapping is this rank's own whatever the number of ranks, so that only lists have to be looked at again.
        deferred = self._engine is None and not isinstance(state_dict, Mapping)
        self._saved = every if deferred else None

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take this rank's share of what all ranks of a checkpoint saved; see `load_state_dict`."""
        self.load_state_dict(list(states))

    def _share(self) -> tuple[int, None, int]:
        """Of the saved ranks every how many, from which on, this rank goes on for, as the arguments of a slice."""
        data = current_data_ranks() if self._engine is None else self._engine.coordinator.data
        return data.rank, None, data.size

    def _begin(self, engine: Engine, event: Event) -> None:
        # A run that goes on in the middle of an epoch fires its beginning too, and keeps what was counted.
        beginnings: dict[Event, int] = {Events.STARTED: 0, Events.EPOCH_STARTED: engine.extension.epoch_began_at}
        goes_on_from = beginnings.get(event)
        if goes_on_from is None or engine.state.iteration <= goes_on_from:
            self.reset()

    def _take(self, engine: Engine) -> None:
        state = engine.state
        # An accumulation group that is begun again after a failure: what its batches gave is in the states.
        if state.iteration <= self._taken_until and engine.extension.is_repeated:
            return
        self._taken_until = state.iteration
        # A filler stands in for a batch that this rank does not have: its output would be counted twice over ranks.
        if state.active and state.samples != 0 and self._feeding is not None:
            self._feeding.take(state.output, self._samples)

    def _samples(self) -> int:
        """How many samples this rank's present batch has."""
        assert self._engine is not None
        return self._engine.extension.samples_in_batch()

    def _join(self, reduction: EventReduction, updates: Event) -> None:
        assert self._engine is not None
        is_new = not reduction.members
        reduction.join(self._set)
        if is_new:
            self._engine.extension.reductions.append(reduction)
        elif any(base_event(each) is base_event(reduction.event) for each in each_event(updates)):
            # Handlers run in the order in which they were added: the reduction comes after all that feeds it.
            self._engine.remove_event_handler(reduction, reduction.event)
        else:
            return
        self._engine.add_event_handler(reduction.event, reduction)

    def _check_fed_by_nobody_else(self, known: Sequence[EventReduction]) -> None:
        own = {id(metric): name for name, metric in named_metrics(self.entries)}
        for member in {id(member): member for reduction in known for member in reduction.members}.values():
            for name, metric in named_metrics(member.entries):
                if id(metric) in own:
                    raise MetricError(
                        f"metric {own[id(metric)]!r} ({type(metric).__name__}) is attached to this engine already, as "
                        f"{name!r} of another Metrics; both would feed and reset it. Give it a metric of its own, such "
                        "as metric.clone(), or put both into one Metrics"
                    )

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

    def _log_unused_options(self) -> None:
        """Say which of torchmetrics' own options of synchronisation have no effect."""
        assert self._engine is not None
        if self._engine.coordinator.world_size == 1:
            return
        log = self._engine.logger
        for name, metric in named_metrics(self.entries):
            kind = type(metric).__name__
            if metric.dist_sync_fn is not None:
                log.warning(
                    "metric %s (%s) has a dist_sync_fn, which is not called; all ranks' states are reduced as "
                    "those of other metrics are",
                    name,
                    kind,
                )
            if metric.process_group is not None:
                log.warning("metric %s (%s) has a process_group; it is reduced over all ranks all the same", name, kind)
            if not metric.sync_on_compute:
                log.warning("metric %s (%s) has sync_on_compute=False; it is reduced all the same", name, kind)
            if metric.dist_sync_on_step:
                log.info("metric %s (%s) has dist_sync_on_step=True; it is reduced at its usage's event", name, kind)


def _check_is_metric(name: str, entry: Any) -> None:
    if isinstance(entry, MetricTracker):
        raise ArgumentTypeError(
            f"metric {name!r} is a MetricTracker, which keeps results of its own over epochs. Give the metric inside "
            "of it, and keep engine.state.metrics at each epoch's end"
        )
    if not isinstance(entry, Metric | MetricCollection):
        raise ArgumentTypeError(f"metric {name!r} is {entry!r}; it must be a torchmetrics Metric or MetricCollection")


def _check_names(entries: Mapping[str, Entry]) -> None:
    """States are saved, and named in errors, by these names."""
    known: dict[str, Metric] = {}
    for name, metric in named_metrics(entries):
        other = known.setdefault(name, metric)
        if other is not metric:
            raise ArgumentError(
                f"two metrics are named {name!r}, a {type(other).__name__} and a {type(metric).__name__}: a dot in a "
                "name stands for what is inside. Choose another name"
            )


def _check_reducible(metrics: MetricSet) -> None:
    for node in metrics.nodes:
        if overrides_sync(node.metric):
            raise MetricError(
                f"metric {node.name!r} ({type(node.metric).__name__}) overrides _sync_dist, by which torchmetrics "
                "reduces states over ranks. allstep reduces all metrics in one collective and does not call it, so the "
                "result could be another one. Leave the method out and say with add_state(..., dist_reduce_fx=...) "
                "how each state reduces: lists may have any lengths on each rank and hold any objects. Or compute the "
                "metric on the main rank only, with Engine(step, coordinator=Alone())"
            )


def _reduction_at(event: Any, known: Sequence[EventReduction]) -> EventReduction:
    return next((each for each in known if each.event == event), None) or EventReduction(event)


def _name_in_checkpoints(entries: Mapping[str, Entry]) -> str:
    """Other metrics have another name, so that a run is not given the state of metrics that it no longer has."""
    name = f"Metrics of {', '.join(entries)}"
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."


def _times(usage: Usage) -> str:
    return f"counted from {event_name(usage.resets)} on and fed at {event_name(usage.updates)}"
