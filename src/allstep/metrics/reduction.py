"""What happens at an event at which metrics are computed: one reduction for all that are attached there.

Contract: an engine has one `EventReduction` for each event at which something is computed; `Metrics.attach` joins it.
At the event every rank exchanges its states, folds those of all ranks, and computes all results from them; these are in
`engine.state.metrics` afterwards, the same bits on all ranks, as tensors on the metrics' device. The metrics' own
states stay, so that counting goes on, also when a `compute` raised. What can go wrong is raised on all ranks alike:
metrics that differ, a metric that has seen nothing anywhere, a `compute` that raises.

The flow is that of `EventReduction.__call__`: plan, exchange, fold, hand states to members that share them, compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torchmetrics import Metric, MetricCollection

from allstep.data.generators import generators_kept, seed_cpu_generators
from allstep.data.keys import key_of
from allstep.engine import Engine, EventEnum, FilteredEvent
from allstep.errors import ArgumentError, MetricError, NotComputableError
from allstep.metrics.describe import Schema, StateLine
from allstep.metrics.exchange import Exchange, Gathered
from allstep.metrics.folding import fold_gathered
from allstep.metrics.nodes import Entry, MetricNode, MetricSet, collections_in, named_metrics
from allstep.metrics.packing import Unmerged, own_elements
from allstep.metrics.states import ReductionPlan, bytes_as_made, make_plan, schema_as_made
from allstep.metrics.torchmetrics_private import (
    DRAWING_NOTHING,
    compute_bookkeeping,
    forget_result,
    is_library_callable,
    is_library_class,
    keep_states_apart,
    set_update_count,
)
from allstep.metrics.usage import event_name
from allstep.world.device_generators import device_draws, device_state, restore_device_state, seed_device

# By a metric's id: its states, by name.
States = dict[int, dict[str, Any]]


class EventReduction:
    """All metrics that one engine computes at one event."""

    def __init__(self, event: EventEnum | FilteredEvent) -> None:
        self.event = event
        self.members: list[MetricSet] = []
        self._nodes: list[MetricNode] = []
        self._leaders: dict[int, Metric] = {}
        self._metrics: list[Metric] = []
        self._draws_nothing = self._draws_only_from_torch = True
        self._collections: list[MetricCollection] = []
        self._entries: list[tuple[str, bool, Entry]] = []
        self._ids_by_result: list[tuple[str, list[int]]] = []
        self._plan: ReductionPlan | None = None
        self._exchange = Exchange()
        self._unchecked: list[MetricNode] = []

    def check_joins(self, member: MetricSet) -> None:
        """Raise ArgumentError when two results would have one name."""
        owners: dict[str, str] = {}
        for each in [*self.members, member]:
            for name, entry in each.entries.items():
                kind = type(entry).__name__
                owner = (
                    f"{kind} {name!r}" if each.names_results else f"{kind}({', '.join(dict(entry.named_children()))})"
                )
                for result in _known_results(name if each.names_results else "", entry):
                    if result in owners:
                        raise ArgumentError(
                            f"two results named {result} are computed at {event_name(self.event)}: of {owners[result]} "
                            f"and of {owner}. Choose other names, or a prefix for a collection"
                        )
                    owners[result] = owner

    def join(self, member: MetricSet) -> None:
        """Compute these metrics too."""
        self._set_members([*self.members, member])
        self._unchecked += [*member.nodes, *member.stateless]

    def leave(self, member: MetricSet) -> None:
        """Compute these metrics no more."""
        self._set_members([each for each in self.members if each is not member])
        self._unchecked = [node for node in self._unchecked if node not in (*member.nodes, *member.stateless)]

    def schema(self) -> Schema:
        """What is reduced, for ranks to compare when a run begins."""
        event = event_name(self.event)
        # Ranks that expect frames of different lengths would abort their process group, so they compare that first.
        further = [*self._compared_lines(), StateLine(event, "all", "", self._exchange.history)]
        return schema_as_made(event, self._nodes, self._leaders, further)

    def __call__(self, engine: Engine) -> None:
        """Reduce, compute, and set the results."""
        plan, coordinator = self._current_plan(), engine.coordinator
        unmerged = self._unmerged(plan)
        if coordinator.world_size == 1:
            states, updates = _of_one_rank(plan, unmerged)
        else:
            self._warn_of_counts(engine)
            gathered = self._exchange.gather(coordinator, plan, unmerged, self._current_plan)
            plan = gathered.plan
            states, updates = states_of_all_ranks(gathered)
        # Copies, since a `compute` may write to its states, and all members of a group compute.
        for node, place in plan.sharing:
            leader = plan.nodes[place].metric
            states[id(node.metric)] = {name: copied(value) for name, value in states[id(leader)].items()}
            updates[id(node.metric)] = updates[id(leader)]
        self._check_seen(updates)
        self._compute(engine, plan, states, updates)

    def _compute(self, engine: Engine, plan: ReductionPlan, states: States, updates: Mapping[int, int]) -> None:
        results: dict[str, Any] = {}
        # Else a collection would have its members compute from one and the same tensors.
        for collection in self._collections:
            keep_states_apart(collection)
        draws = nullcontext() if self._draws_nothing else self._same_draws(engine, plan.device)
        with torch.no_grad(), draws, installed(self._metrics, states, updates):
            owners: dict[str, str] = {}
            for name, names_results, entry in self._entries:
                found = _named_results(name if names_results else "", entry, entry.compute())
                if not results.keys().isdisjoint(found):
                    twice = next(result for result in found if result in results)
                    raise MetricError(f"metrics {owners[twice]!r} and {name!r} both give a result named {twice!r}")
                results |= found
                owners |= dict.fromkeys(found, name)
        engine.state.metrics.update(results)

    def _same_draws(self, engine: Engine, device: torch.device) -> AbstractContextManager[None]:
        state = engine.state
        key = key_of(state.seed or 0, state.epoch, state.iteration)
        return same_draws(key, device, only_torch=self._draws_only_from_torch)

    def _check_seen(self, updates: Mapping[int, int]) -> None:
        unseen = []
        for name, ids in self._ids_by_result:
            # Arithmetic on several metrics can be computed when any of them has seen something.
            counts = [updates[metric] for metric in ids if metric in updates]
            if counts and not any(counts):
                unseen.append(name)
        if unseen:
            raise NotComputableError(
                f"at {event_name(self.event)} these metrics have seen no sample on any rank: {', '.join(unseen)}. "
                "Check that there is data, that output_transform does not give None for all of it, and that the "
                "usage's `computes` is not due before the first batch that its `updates` takes in: where that is "
                "filtered, `computes` needs the same filter"
            )

    def _warn_of_counts(self, engine: Engine) -> None:
        """Say once, after its first batch, which attributes of a metric no rank adds up."""
        for node in [each for each in self._unchecked if each.updates]:
            self._unchecked.remove(node)
            names = node.counts_outside_states()
            if names:
                engine.logger.warning(
                    "metric %s (%s): its update changes %s, which is no state, so that results are not those of "
                    "all ranks; declare it with add_state",
                    node.name,
                    type(node.metric).__name__,
                    ", ".join(names),
                )

    def _set_members(self, members: Sequence[MetricSet]) -> None:
        self.members = list(members)
        self._collections = [each for member in members for each in collections_in(member.entries.values())]
        self._nodes = [node for member in members for node in member.nodes]
        self._leaders = {metric: leader for member in members for metric, leader in member.leaders.items()}
        # Frames begin anew with the members, on all ranks at once: `history` in the schema shows where they did not.
        self._exchange = Exchange(fixed=bytes_as_made(self._nodes, self._leaders))
        self._metrics = [metric for member in members for _, metric in named_metrics(member.entries)]
        self._draws_only_from_torch = all(map(draws_only_from_torch, self._metrics))
        self._draws_nothing = self._draws_only_from_torch and all(map(draws_nothing, self._metrics))
        self._entries = [
            (name, member.names_results, entry) for member in members for name, entry in member.entries.items()
        ]
        self._ids_by_result = [
            (name, [id(metric) for _, metric in named_metrics({name: entry})]) for name, _, entry in self._entries
        ]
        self._plan = None

    def _current_plan(self) -> ReductionPlan:
        if self._plan is None or not self._plan.is_current():
            self._plan = make_plan(event_name(self.event), self._nodes, self._leaders, self._compared_lines())
        return self._plan

    def _compared_lines(self) -> list[StateLine]:
        event = event_name(self.event)
        return [StateLine(event, name, "", text) for member in self.members for name, text in member.compared]

    def _unmerged(self, plan: ReductionPlan) -> Unmerged:
        held = {key: values for member in self.members for key, values in member.unmerged.items()}
        if not held:
            return {}
        places = {id(node.metric): place for place, node in enumerate(plan.nodes)}
        return {(places[metric], name): values for (metric, name), values in held.items() if metric in places}


# The states of all ranks together


def states_of_all_ranks(gathered: Gathered) -> tuple[States, dict[int, int]]:
    """What all ranks' states are together, each where its metric has its own, and how many batches each metric took."""
    plan = gathered.plan
    states: States = {id(node.metric): {} for node in plan.nodes}
    for block, values in zip(plan.blocks, gathered.blocks, strict=True):
        for state, part in zip(block.states, block.parts(values), strict=True):
            # Metrics may be on several devices, and travel over one.
            own = part.to(plan.value(state).device)
            states[id(plan.nodes[state.node].metric)][state.name] = own
    for at, listed in enumerate(plan.gathered):
        node = plan.nodes[listed.node]
        folded = fold_gathered(listed, node.name, [rank.gathered[at] for rank in gathered.ranks])
        if folded is None:
            folded = [] if listed.is_list else plan.value(listed).clone()
        elif listed.is_list:
            folded = _moved(folded, torch.device("cpu") if node.metric.compute_on_cpu else node.metric.device)
        else:
            folded = _moved(folded, plan.value(listed).device)
        states[id(node.metric)][listed.name] = folded
    for rank in reversed(gathered.ranks):  # the first rank that has set an attribute comes last, and holds
        for place, attributes in rank.values.items():
            states[id(plan.nodes[place].metric)].update(attributes)
    counts = map(sum, zip(*[rank.updates for rank in gathered.ranks], strict=True))
    return states, {id(node.metric): count for node, count in zip(plan.nodes, counts, strict=True)}


def _of_one_rank(plan: ReductionPlan, unmerged: Unmerged) -> tuple[States, dict[int, int]]:
    plan.check_tensors()
    states: States = {id(node.metric): {} for node in plan.nodes}
    for block in plan.blocks:
        for state in block.states:
            states[id(plan.nodes[state.node].metric)][state.name] = copied(plan.value(state))
    for listed in plan.gathered:
        node, value = plan.nodes[listed.node], plan.value(listed)
        brought = unmerged.get((listed.node, listed.name), ())
        if brought:
            value = fold_gathered(listed, node.name, [own_elements(node, listed, brought)])
        states[id(node.metric)][listed.name] = copied(value)
    for _, place in plan.sharing:  # a member that is not fed lacks what its leader has set beside the states
        states[id(plan.nodes[place].metric)].update(plan.nodes[place].changed_values())
    return states, {id(node.metric): node.updates for node in plan.nodes}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [_moved(each, device) for each in value] if isinstance(value, list) else value


def copied(value: Any) -> Any:
    """A state of its own memory, so that a `compute` that writes to it spoils no other: tensors, and those of lists."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return [copied(each) for each in value] if isinstance(value, list) else value


# Computing from them


@contextmanager
def installed(
    metrics: Iterable[Metric], states: Mapping[int, Mapping[str, Any]], updates: Mapping[int, int]
) -> Iterator[None]:
    """Have metrics hold other states for a while, and compute from them without asking other ranks.

    Args:
        metrics: all that take part, those inside of others too.
        states: by the metric's id, attributes and their values. Lists and tensors are the callee's to change.
        updates: by the metric's id, how many batches all ranks took.
    """
    before: list[tuple[Metric, dict[str, Any], list[str]]] = []
    try:
        for metric in metrics:
            attributes, new = vars(metric), states.get(id(metric), {})
            kept = {name: attributes[name] for name in (*compute_bookkeeping(), *new) if name in attributes}
            before.append((metric, kept, [name for name in new if name not in attributes]))
            count = updates.get(id(metric), metric.update_count)
            attributes.update(new)
            attributes["distributed_available_fn"] = _nowhere  # so that `compute` does not synchronise by itself
            set_update_count(metric, count)
            forget_result(metric)
        yield
    finally:
        # In reverse, so that a metric which is listed twice ends as it began.
        for metric, kept, absent in reversed(before):
            vars(metric).update(kept)
            for name in absent:
                vars(metric).pop(name, None)


def _nowhere() -> bool:
    return False


@contextmanager
def same_draws(key: int, device: torch.device, *, only_torch: bool = False) -> Iterator[None]:
    """Seed all generators from a key for a while, and leave them as they were.

    Some metrics draw random numbers in `compute` (inception score permutes features); each rank has to draw the same.

    Args:
        key: 64 bits, the same on all ranks.
        device: whose generator, where it has one, is seeded beside those of the host.
        only_torch: leave Python's and numpy's generators alone. To keep numpy's takes longer than most metrics compute.
    """
    host = torch.get_rng_state() if only_torch else None
    with nullcontext() if only_torch else generators_kept():
        if only_torch:
            torch.default_generator.manual_seed(key >> 1)
        else:
            seed_cpu_generators(key)
        drawn = device_state(device) if device_draws(device) else None
        try:
            if drawn is not None:
                seed_device(device, key >> 1)
            yield
        finally:
            if drawn is not None:
                restore_device_state(device, drawn)
            if host is not None:
                torch.set_rng_state(host)


def draws_only_from_torch(metric: Metric) -> bool:
    """Whether a metric's `compute` can draw from no generator but torch's.

    So it is with torchmetrics' own metrics that were given no function and no module of a user's.
    """
    parts = [value for module in metric.modules() for value in (module, *vars(module).values()) if callable(value)]
    return is_library_class(type(metric)) and all(map(is_library_callable, parts))


def draws_nothing(metric: Metric) -> bool:
    """Whether the `compute` of a metric for which `draws_only_from_torch` holds draws from no generator at all.

    To keep, seed and restore torch's generator takes a tenth of the time of one metric's epoch end.
    """
    return type(metric).__module__.startswith(DRAWING_NOTHING)


# The results' names


def _known_results(name: str, entry: Entry) -> list[str]:
    """Names of results as far as they are known before anything is computed."""
    if not isinstance(entry, MetricCollection):
        return [name]
    return [f"{name}/{key}" if name else str(key) for key in entry.keys(keep_base=False)]


def _named_results(name: str, entry: Entry, value: Any) -> dict[str, Any]:
    if not isinstance(entry, MetricCollection):
        return {name: value}
    return {f"{name}/{key}" if name else str(key): each for key, each in value.items()}
