"""What happens at an event at which metrics are computed: one reduction for all that are attached there.

Contract: an engine has one `EventReduction` for each event at which something is computed; `Metrics.attach` joins it.
At the event every rank exchanges its states, folds those of all ranks, and computes all results from them; these are in
`engine.state.metrics` afterwards, the same bits on all ranks, as tensors on the metrics' device. The metrics' own
states stay. What can go wrong is raised on all ranks alike: metrics that differ, a metric that has seen nothing
anywhere, a `compute` that raises.

Computing results from what all ranks have, and leaving each metric as it was.

Contract: inside `installed` the metrics hold the states that are given, know how many batches all ranks have taken, and
compute without reducing anything themselves. Afterwards they hold what they held before, also when `compute` raised, so
that counting goes on. `same_draws` makes a `compute` that draws random numbers (inception score permutes features) draw
the same on every rank, and leaves the generators as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import Metric, MetricCollection

from allstep.coordination import Schema, StateLine
from allstep.data.keys import key_of
from allstep.data.seeding import generators_kept, seed_cpu_generators
from allstep.engine import Engine, EventEnum, FilteredEvent
from allstep.errors import MetricError, NotComputableError
from allstep.metrics.exchange import Exchange, Gathered
from allstep.metrics.folding import fold_listed
from allstep.metrics.nodes import Entry, Node, collections, named_metrics
from allstep.metrics.own_sync import sync_by_itself
from allstep.metrics.packing import Carried, given
from allstep.metrics.states import Plan, bytes_as_made, make_plan, schema_as_made
from allstep.metrics.torchmetrics_private import COMPUTING
from allstep.metrics.usage import event_name

if TYPE_CHECKING:
    from allstep.metrics.metrics import Metrics


States = dict[int, dict[str, Any]]


class EventReduction:
    """All metrics that one engine computes at one event."""

    def __init__(self, event: EventEnum | FilteredEvent) -> None:
        self.event = event
        self.members: list[Metrics] = []
        self._found: list[Node] = []
        self._following: dict[int, Metric] = {}
        self._metrics: list[Metric] = []
        self._collections: list[MetricCollection] = []
        self._parts: list[tuple[str, list[int]]] = []
        self._plan: Plan | None = None
        self._exchange = Exchange()
        self._looked_at: set[int] = set()

    def check_joins(self, member: Metrics) -> None:
        """Raise ValueError when two results would have one name."""
        owners: dict[str, str] = {}
        for each in [*self.members, member]:
            for name, entry in each.entries.items():
                kind = type(entry).__name__
                owner = (
                    f"{kind} {name!r}" if each.names_results else f"{kind}({', '.join(dict(entry.named_children()))})"
                )
                for result in _known_results(name if each.names_results else "", entry):
                    if result in owners:
                        raise ValueError(
                            f"two results named {result} are computed at {event_name(self.event)}: of {owners[result]} "
                            f"and of {owner}. Choose other names, or a prefix for a collection"
                        )
                    owners[result] = owner

    def join(self, member: Metrics) -> None:
        """Compute these metrics too."""
        self._become([*self.members, member])

    def leave(self, member: Metrics) -> None:
        """Compute these metrics no more."""
        self._become([each for each in self.members if each is not member])

    def schema(self) -> Schema:
        """What is reduced, for ranks to compare when a run begins."""
        event = event_name(self.event)
        further = [*self._further(), StateLine(event, "all", "", self._exchange.history)]
        return schema_as_made(event, self._found, self._following, further)

    def __call__(self, engine: Engine) -> None:
        """Reduce, compute, and set the results."""
        plan, coordinator = self._present_plan(), engine.coordinator
        carried = self._carried(plan)
        if coordinator.world_size == 1:
            states, updates = _of_one_rank(plan, carried)
        else:
            self._warn_of_counts(engine)
            gathered = self._exchange.gather(coordinator, plan, carried, self._present_plan)
            plan = self._present_plan()
            states, updates = _of_all_ranks(plan, gathered)
        for node in plan.alone:
            if coordinator.world_size > 1:
                states[id(node.metric)] = sync_by_itself(coordinator, node)
                updates[id(node.metric)] = sum(coordinator.gather(node.updates))
            else:
                updates[id(node.metric)] = node.updates
        for follower, place in plan.followers:
            leader = plan.nodes[place].metric
            states[id(follower.metric)] = {name: copied(value) for name, value in states[id(leader)].items()}
            updates[id(follower.metric)] = updates[id(leader)]
        self._check_seen(updates)
        self._compute(engine, plan, states, updates)

    def _compute(self, engine: Engine, plan: Plan, states: States, updates: Mapping[int, int]) -> None:
        state = engine.state
        key = key_of(state.seed or 0, state.epoch, state.iteration)
        results: dict[str, Any] = {}
        owners: dict[str, str] = {}
        for collection in self._collections:
            collection._state_is_copy = True  # else it would have its members compute from one and the same tensors
        with torch.no_grad(), same_draws(key, plan.device), installed(self._metrics, states, updates):
            for member in self.members:
                for name, entry in member.entries.items():
                    found = _named_results(name if member.names_results else "", entry, entry.compute())
                    twice = next((result for result in found if result in results), None)
                    if twice is not None:
                        raise MetricError(f"metrics {owners[twice]!r} and {name!r} both give a result named {twice!r}")
                    results |= found
                    owners.update(dict.fromkeys(found, name))
        state.metrics.update(results)

    def _check_seen(self, updates: Mapping[int, int]) -> None:
        unseen = []
        for name, parts in self._parts:
            counts = [updates[part] for part in parts if part in updates]
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
        """Say once which attributes no rank adds up."""
        for member in self.members:
            for node in (*member.nodes, *member.stateless):
                if not node.updates or id(node.metric) in self._looked_at:
                    continue
                self._looked_at.add(id(node.metric))
                names = node.counted()
                if names:
                    engine.logger.warning(
                        "metric %s (%s): its update changes %s, which is no state, so that results are not those of "
                        "all ranks; declare it with add_state",
                        node.name,
                        type(node.metric).__name__,
                        ", ".join(names),
                    )

    def _become(self, members: Sequence[Metrics]) -> None:
        self.members = list(members)
        self._collections = [each for member in members for each in collections(member.entries.values())]
        self._found = [node for member in members for node in member.nodes]
        self._following = {follower: leader for member in members for follower, leader in member.following.items()}
        self._exchange = Exchange(fixed=bytes_as_made(self._found, self._following))
        self._metrics = [metric for member in members for _, metric in named_metrics(member.entries)]
        self._parts = [
            (name, [id(part) for _, part in named_metrics({name: entry})])
            for member in members
            for name, entry in member.entries.items()
        ]
        self._plan = None

    def _present_plan(self) -> Plan:
        if self._plan is None or not self._plan.is_current():
            self._plan = make_plan(event_name(self.event), self._found, self._following, self._further())
        return self._plan

    def _further(self) -> list[StateLine]:
        event = event_name(self.event)
        return [StateLine(event, name, "", text) for member in self.members for name, text in member.described]

    def _carried(self, plan: Plan) -> Carried:
        held = {key: value for member in self.members for key, value in member.carried.items()}
        if not held:
            return {}
        places = {id(node.metric): place for place, node in enumerate(plan.nodes)}
        return {(places[metric], name): value for (metric, name), value in held.items() if metric in places}


def _of_all_ranks(plan: Plan, gathered: Gathered) -> tuple[States, dict[int, int]]:
    states: States = {id(node.metric): {} for node in plan.nodes}
    for block, values in zip(plan.blocks, gathered.blocks, strict=True):
        for state, part in zip(block.states, torch.split(values, [s.shape.numel() for s in block.states]), strict=True):
            states[id(plan.nodes[state.node].metric)][state.name] = part.reshape(state.shape)
    for at, listed in enumerate(plan.listed):
        node = plan.nodes[listed.node]
        folded = fold_listed(listed, node.name, [rank.listed[at] for rank in gathered.ranks])
        if folded is None:
            folded = [] if listed.is_list else getattr(node.metric, listed.name).clone()
        elif listed.is_list and node.metric.compute_on_cpu:
            folded = _on_cpu(folded)
        states[id(node.metric)][listed.name] = folded
    for rank in reversed(gathered.ranks):  # so that the first that has learnt something is heard
        for place, learnt in rank.learnt.items():
            states[id(plan.nodes[place].metric)].update(learnt)
    counts = [sum(counts) for counts in zip(*(rank.updates for rank in gathered.ranks), strict=True)]
    return states, {id(node.metric): count for node, count in zip(plan.nodes, counts, strict=True)}


def _of_one_rank(plan: Plan, carried: Carried) -> tuple[States, dict[int, int]]:
    plan.check_tensors()
    states: States = {id(node.metric): {} for node in plan.nodes}
    for block in plan.blocks:
        for state in block.states:
            node = plan.nodes[state.node]
            states[id(node.metric)][state.name] = copied(state.value(node))
    for listed in plan.listed:
        node = plan.nodes[listed.node]
        brought = carried.get((listed.node, listed.name), ())
        value = getattr(node.metric, listed.name)
        if brought:
            value = fold_listed(listed, node.name, [given(node, listed, brought)])
        states[id(node.metric)][listed.name] = copied(value)
    for _, place in plan.followers:  # what its leader has learnt, it lacks
        states[id(plan.nodes[place].metric)].update(plan.nodes[place].learnt())
    return states, {id(node.metric): node.updates for node in plan.nodes}


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    return [_on_cpu(each) for each in value] if isinstance(value, list) else value


def _known_results(name: str, entry: Entry) -> list[str]:
    """Names of results as far as they are known before anything is computed."""
    if not isinstance(entry, MetricCollection):
        return [name]
    return [f"{name}/{key}" if name else str(key) for key in entry.keys(keep_base=False)]


def _named_results(name: str, entry: Entry, value: Any) -> dict[str, Any]:
    if not isinstance(entry, MetricCollection):
        return {name: value}
    return {f"{name}/{key}" if name else str(key): each for key, each in value.items()}


@contextmanager
def installed(
    metrics: Iterable[Metric], states: Mapping[int, Mapping[str, Any]], updates: Mapping[int, int]
) -> Iterator[None]:
    """Have metrics hold other states for a while.

    Args:
        metrics: all that take part, those inside of others too.
        states: by the metric's id, attributes and their values. Lists and tensors are the callee's to change.
        updates: by the metric's id, how many batches all ranks took.
    """
    before: list[tuple[Metric, dict[str, Any], list[str]]] = []
    try:
        for metric in metrics:
            held = vars(metric)
            new = states.get(id(metric), {})
            names = [*new, *COMPUTING]
            before.append((metric, {n: held[n] for n in names if n in held}, [n for n in names if n not in held]))
            held.update(new)
            count = updates.get(id(metric), metric._update_count)
            held.update(_update_count=count, _computed=None, _to_sync=False, _is_synced=False, _should_unsync=True)
        yield
    finally:
        for metric, kept, absent in reversed(before):
            vars(metric).update(kept)
            for name in absent:
                vars(metric).pop(name, None)


@contextmanager
def same_draws(key: int, device: torch.device) -> Iterator[None]:
    """Seed all generators from a key for a while."""
    with generators_kept():
        seed_cpu_generators(key)
        if device.type != "cuda":
            yield
            return
        drawn = torch.cuda.get_rng_state(device)
        try:
            place = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[place].manual_seed(key >> 1)
            yield
        finally:
            torch.cuda.set_rng_state(drawn, device)


def copied(value: Any) -> Any:
    """A state of its own memory, so that a `compute` that writes to it spoils no other: tensors, and those of lists."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return [copied(each) for each in value] if isinstance(value, list) else value
