"""`Gather`: the outputs of all ranks, joined in the order of the samples.

Contract: attached to one engine before its run, on every rank alike: ranks compare their settings when the run begins.
Each iteration of this rank's own is copied to the host. Over allstep's own loader the sampler says by arithmetic which
sample stood where, so that the order is the dataset's at any world size; over other data, and where collation made more
or fewer samples than were dealt, it is by iteration, then rank.
An epoch that was resumed in its middle has what this process saw of it, and rank 0 logs what is missing.

Protocol, at each epoch's end. Every rank tells all others how much it has, or why it has nothing (`RankSummary`). Then
either all give each other all of it, in pieces, or, where that is more than the limit and a folder was given, each
writes a part. Last, every rank says whether that went well. What can go wrong is raised on all ranks alike as a
`MetricError`, whatever it is on one of them: names that the output lacks, outputs without a value a sample, memory or a
folder that is full.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from allstep.coordination import Coordinator
from allstep.cuda import recorded_event
from allstep.engine import Engine, Events
from allstep.errors import ArgumentError, MetricError
from allstep.metrics.describe import Schema, StateLine
from allstep.metrics.packing import Packed
from allstep.metrics.states import padded
from allstep.outputs.parts import Format, Parts, write_part
from allstep.outputs.samples import (
    NO_SAMPLES,
    POSITION_SIZE,
    BatchOutput,
    Column,
    Samples,
    column_of,
    join_samples,
    named_outputs,
    pack_samples,
    unpack_samples,
)
from allstep.world import current_data_ranks

_IN_FLIGHT = 8  # batches that may be on their way from a device, in pinned memory
PIECE = 64 * 2**20  # bytes of a payload that one collective carries


@dataclass(frozen=True, slots=True)
class RankSummary:
    """What a rank tells the others before anything is given.

    Attributes:
        manifest: what is needed to read its payload.
        size: bytes of its payload.
        samples: how many it has.
        has_indices: whether a sampler said where all of them stood.
        missing: iterations at the epoch's beginning that this process did not see.
        failure: why it has nothing to give, if so.
    """

    manifest: list[int]
    size: int
    samples: int
    has_indices: bool
    missing: int
    failure: str | None


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """What one iteration gave: where its samples stand, as `Samples` has it, and by name their values."""

    positions: torch.Tensor
    values: dict[str, BatchOutput]
    has_indices: bool


class Gather:
    """Outputs of all ranks in sample order, in `engine.state.gathered` at each epoch's end.

    There it is a mapping from each name to a tensor with a row a sample, to a list of tensors where shapes differ, or
    to a list of texts where the step returns those, such as samples' names. All is on the host. "index" has the
    samples' indices in the dataset, int64, where allstep's loader dealt them. Parts in a folder are a `Parts`, which
    `load()`s that.

    A checkpoint has what was seen of its epoch. Where it has not, an epoch that a run goes on with in its middle has
    what was seen since; what that lacks is logged, and "index" tells which samples there are.

    Args:
        names: keys of the step's output; or, where it is a tuple, names for its elements in order; or one for all.
        to: "all" ranks or the "main" one; on the others `state.gathered` is then None.
        folder: where parts are written when what all ranks have is larger than `limit`; seen by all ranks. Each epoch
            has a folder in it, and replaces the parts that another run left there.
        limit: bytes.
        format: of the parts, "npy" or "safetensors".

    Raises:
        ArgumentError: no name, one twice, or an unknown `to` or `format`.
    """

    state_differs_by_rank = True  # a checkpoint keeps each rank's

    def __init__(
        self,
        *names: str,
        to: Literal["all", "main"] = "all",
        folder: Path | str | None = None,
        limit: int = 2**30,
        format: Format = "npy",
    ) -> None:
        if not names or len(set(names)) < len(names) or "index" in names:
            raise ArgumentError(
                f"names are {', '.join(names) or 'none'}; give at least one, each once, and not 'index'"
            )
        if to not in ("all", "main"):
            raise ArgumentError(f"to is {to!r}; it must be 'all' or 'main'")
        if format not in ("npy", "safetensors"):
            raise ArgumentError(f"format is {format!r}; it must be 'npy' or 'safetensors'")
        self.names = names
        self.to = to
        self.folder = None if folder is None else Path(folder).absolute()
        self.limit = limit
        self.format: Format = format
        self._batches: dict[int, BatchRecord] = {}  # by the iteration's number in the epoch
        self._epoch = 0
        self._seen = 0  # iterations of the epoch that are in `_batches`, but for those missing at its beginning
        self._missing = 0
        self._copies: deque[tuple[int, list[torch.Event]]] = deque()
        self._data: Any = None
        self._was_loaded = False  # and no run has gone on from it yet
        self._engine: Engine | None = None
        self._failure: Exception | None = None

    def attach(self, engine: Engine) -> Gather:
        """Keep the outputs of `engine`, and gather them when its epochs end.

        Raises:
            MetricError: the engine is running, or has a Gather already.
        """
        if engine.is_running:
            raise MetricError("the engine is running; attach a Gather before run(), on every rank alike")
        if any(isinstance(each, Gather) for each in engine.extension.reductions):
            raise MetricError("the engine has a Gather already; give that one all names")
        self._engine = engine
        engine.extension.reductions.append(self)
        engine.extension.add_state(self)
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._take)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._gather)
        return self

    def schema(self) -> Schema:
        """What is gathered and how, for ranks to compare when a run begins."""
        files = "" if self.folder is None else f", above {self.limit} bytes in {self.format} files in {self.folder}"
        form = f"{', '.join(self.names)} for {'all ranks' if self.to == 'all' else 'the main rank'}{files}"
        return (StateLine(Events.EPOCH_COMPLETED.name, "Gather", "outputs", form),)

    def state_dict(self) -> dict[str, Any]:
        """What this rank has of the epoch so far, on the host; to be saved by each rank for itself."""
        self._wait_for_copies()
        batches = {
            number: {"positions": each.positions, "values": dict(each.values), "has_indices": each.has_indices}
            for number, each in self._batches.items()
        }
        return {"epoch": self._epoch, "seen": self._seen, "missing": self._missing, "batches": batches}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on inside the epoch of which `state_dict` gave the beginning."""
        self._take_over([state_dict], state_dict)

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take this rank's share of what all ranks of a checkpoint, of any number, had of the epoch."""
        data = current_data_ranks() if self._engine is None else self._engine.coordinator.data
        share = states[data.rank :: data.size]
        self._take_over(share, states[0])

    def _take_over(self, share: Sequence[Mapping[str, Any]], first: Mapping[str, Any]) -> None:
        self._epoch, self._seen, self._missing = first["epoch"], first["seen"], first["missing"]
        found: dict[int, list[Any]] = {}
        for state in share:
            for number, batch in state["batches"].items():
                found.setdefault(number, []).append(batch)
        self._batches = {
            number: BatchRecord(
                torch.cat([each["positions"] for each in batches]),
                {name: column_of([each["values"][name] for each in batches]) for name in self.names},
                all(each["has_indices"] for each in batches),
            )
            for number, batches in found.items()
        }
        self._was_loaded, self._failure = True, None

    def _begin(self, engine: Engine) -> None:
        state = engine.state
        done = state.iteration - engine.extension.epoch_began_at
        # The same epoch goes on: from a checkpoint, or over the same data after an interruption or an error.
        is_known = self._was_loaded or state.dataloader is self._data
        same = state.epoch == self._epoch and is_known and self._failure is None
        self._was_loaded = False
        if same and 0 < done <= self._seen:  # iterations after the place from which the run goes on are run again
            self._batches = {number: batch for number, batch in self._batches.items() if number < done}
        else:
            self._batches, self._missing = {}, done
            self._copies.clear()
        self._epoch, self._seen, self._data, self._failure = state.epoch, done, state.dataloader, None

    def _take(self, engine: Engine) -> None:
        state = engine.state
        number = state.iteration - engine.extension.epoch_began_at - 1
        self._seen = number + 1
        if not state.active or state.samples == 0 or self._failure is not None:
            return
        try:
            values = named_outputs(state.output, self.names)
            self._batches[number] = self._with_positions(engine, number, values)
            self._note_copies(number, cuda_devices(state.output))
        except Exception as error:  # whatever it is, the others have to hear of it
            error.add_note(f"(iteration {state.iteration})")
            self._failure, self._batches = error, {}

    def _note_copies(self, number: int, devices: set[torch.device]) -> None:
        """Copies of a batch are under way from these devices, into pinned memory; do not hold much of that."""
        if not devices:
            return
        self._copies.append((number, [recorded_event(device) for device in devices]))
        if len(self._copies) > _IN_FLIGHT:
            oldest, events = self._copies.popleft()
            for event in events:  # of some iterations ago: it has mostly come to pass
                event.synchronize()
            if oldest in self._batches:
                self._batches[oldest] = replace(
                    self._batches[oldest],
                    values={name: unpinned(value) for name, value in self._batches[oldest].values.items()},
                )

    def _wait_for_copies(self) -> None:
        """Have all copies that are under way come to the host."""
        for _, events in self._copies:
            for event in events:
                event.synchronize()

    def _with_positions(self, engine: Engine, number: int, values: dict[str, BatchOutput]) -> BatchRecord:
        """The outputs of the epoch's batch `number` with where its samples stand."""
        state = engine.state
        samples = len(values[self.names[0]])
        sampler = getattr(state.dataloader, "batch_sampler", None)
        # The sampler knows where a batch stood only where its own epoch is the engine's, batch for batch.
        whole = getattr(sampler, "global_length", None) == state.epoch_length
        positions = torch.full((samples, POSITION_SIZE), number, dtype=torch.int64)
        if whole and hasattr(sampler, "indices") and state.dataloader is self._data:
            indices = sampler.indices(number)  # type: ignore[union-attr]
            if len(indices) == samples:
                positions[:, 0] = torch.from_numpy(indices)
                return BatchRecord(positions, values, has_indices=True)
            # Collation may have left samples out, or made several of one; which of them is not known then.
            counted = engine.extension.samples_in_batch()
            if counted != samples:
                raise ArgumentError(f"the output has {samples} samples, but the batch had {counted}")
        return BatchRecord(positions, values, has_indices=False)

    def _gather(self, engine: Engine) -> None:
        coordinator = engine.coordinator
        own, packed = NO_SAMPLES, Packed([], [])
        has_indices = all(batch.has_indices for batch in self._batches.values())
        try:
            # A rank that failed takes part all the same, with nothing, so that the others hear why. So does one whose
            # batches another rank has too, as in a tensor-parallel group.
            if self._failure is None and not coordinator.data.is_twin:
                own = self._own()
                packed = pack_samples(own, self.names)
        except Exception as error:
            self._failure = error
        summaries: list[RankSummary] = coordinator.gather(
            RankSummary(
                packed.manifest,
                packed.size,
                len(own.positions),
                has_indices,
                self._missing,
                _failure_text(self._failure),
            )
        )
        _raise_failures("outputs could not be gathered", [each.failure for each in summaries], self._failure)
        _log_missing(engine, max(each.missing for each in summaries))
        gathered: Any
        if self.folder is not None and sum(each.size for each in summaries) > self.limit:
            gathered = self._write(coordinator, own, summaries, self.folder / f"epoch-{engine.state.epoch:04d}")
        else:
            gathered = self._join(coordinator, packed, summaries)
        engine.state.gathered = gathered  # type: ignore[attr-defined]
        self._batches = {}

    def _own(self) -> Samples:
        batches = [self._batches[number] for number in sorted(self._batches)]
        self._wait_for_copies()
        positions = torch.cat([each.positions for each in batches]) if batches else NO_SAMPLES.positions
        return Samples(positions, {name: column_of([each.values[name] for each in batches]) for name in self.names})

    def _wants(self, coordinator: Coordinator) -> bool:
        return self.to == "all" or coordinator.rank == 0

    def _join(
        self, coordinator: Coordinator, packed: Packed, summaries: Sequence[RankSummary]
    ) -> dict[str, Column] | None:
        """Every rank's samples, in memory."""
        found, failure, wants = None, None, self._wants(coordinator)
        try:
            payloads = _gather_payloads(coordinator, packed, [each.size for each in summaries], wants=wants)
            if wants:
                different = slice(None, None, coordinator.data.sharing)
                every = [
                    unpack_samples(each.manifest, payload, self.names)
                    for each, payload in zip(summaries[different], payloads[different], strict=True)
                ]
                found = join_samples(every, self.names, have_indices=_have_indices(summaries))
        except Exception as error:
            failure = error
        # Joining can run out of memory on one rank only, which must not go on alone.
        _agree("outputs could not be joined", coordinator, failure)
        return found

    def _write(
        self, coordinator: Coordinator, own: Samples, summaries: Sequence[RankSummary], folder: Path
    ) -> Parts | None:
        """Every rank's samples, in files."""
        # A full disk or a missing folder of one rank is an error of all, who would else wait for it in the next epoch.
        failure, data = None, coordinator.data
        try:
            if not data.is_twin:
                write_part(folder, own, data.rank, data.size, self.format)
        except Exception as error:
            failure = error
        _agree("a part could not be written", coordinator, failure)
        samples = sum(each.samples for each in summaries)
        parts = Parts(folder, self.names, data.size, samples, self.format, _have_indices(summaries))
        return parts if self._wants(coordinator) else None


def _log_missing(engine: Engine, missing: int) -> None:
    if missing and engine.coordinator.rank == 0:
        engine.logger.warning(
            "epoch %d was resumed after its iteration %d: what is gathered lacks the outputs of the iterations before",
            engine.state.epoch,
            missing,
        )


def _have_indices(summaries: Sequence[RankSummary]) -> bool:
    return all(each.has_indices for each in summaries)


def _agree(what: str, coordinator: Coordinator, failure: Exception | None) -> None:
    """Raise on all ranks when one has failed."""
    _raise_failures(what, coordinator.gather(_failure_text(failure)), failure)


def _failure_text(failure: Exception | None) -> str | None:
    """What other ranks are told of an exception."""
    if failure is None:
        return None
    notes = " ".join(getattr(failure, "__notes__", ()))
    return f"{type(failure).__name__}: {failure} {notes}".rstrip()


def _raise_failures(what: str, failures: Sequence[str | None], own: Exception | None) -> None:
    told = "; ".join(f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure is not None)
    if told:
        raise MetricError(f"{what}: {told}") from own


def _gather_payloads(
    coordinator: Coordinator, packed: Packed, sizes: Sequence[int], *, wants: bool
) -> list[torch.Tensor]:
    """Every rank's payload, given in pieces so that a rank that wants none never holds much more than one.

    Args:
        coordinator: of the ranks.
        packed: what this rank gives.
        sizes: bytes that each rank gives.
        wants: whether this rank is given anything; else the result is empty.
    """
    longest = max(sizes)
    own: torch.Tensor | None = None
    received: list[torch.Tensor] = []
    failure: Exception | None = None
    try:
        own = torch.empty(longest, dtype=torch.uint8)
        packed.write(own)
        if coordinator.world_size == 1:
            return [own]
        received = [torch.empty(padded(size), dtype=torch.uint8) for size in sizes] if wants else []
    except Exception as error:  # most likely of memory; the others are waiting
        failure = error
    for at in range(0, longest, PIECE):
        length = min(PIECE, longest - at)
        rows = coordinator.gather_bytes(
            torch.zeros(length, dtype=torch.uint8) if own is None else own[at : at + length]
        )
        for whole, row in zip(received, rows, strict=bool(received)):
            # A payload that is shorter than the longest ends in some piece; what follows of its row is padding.
            piece = whole[at : at + length]
            piece.copy_(row[: len(piece)])
    if failure is not None:
        raise failure
    return received


def unpinned(value: BatchOutput) -> BatchOutput:
    """A batch's values in plain memory, once they have arrived; pinned memory goes back to torch for the next batch."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_pinned() else value
    return cast(BatchOutput, [unpinned(each) if isinstance(each, torch.Tensor) else each for each in value])


def cuda_devices(output: Any) -> set[torch.device]:
    """The devices whose tensors an output has, from which copies to the host may be under way."""
    if isinstance(output, torch.Tensor):
        return {output.device} if output.is_cuda else set()
    if isinstance(output, Mapping):
        output = list(output.values())
    return set().union(*map(cuda_devices, output)) if isinstance(output, list | tuple) else set()
