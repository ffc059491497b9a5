"""`Gather`: the outputs of all ranks, joined in the order of the samples.

Contract: attached to one engine before its run, on every rank alike: ranks compare their settings when the run begins.
Each iteration of this rank's own is copied to the host; at the epoch's end ranks tell each other how much they have and
then either give each other all of it, in pieces, or, where that is more than the limit and a folder was given, write a
part each. Over allstep's own loader the sampler says by arithmetic which sample stood where, so that the order is the
dataset's at any world size; over other data it is by iteration, then rank. An epoch that was resumed in its middle has
what this process saw of it, and rank 0 logs what is missing. What can go wrong is raised on all ranks alike, whatever
it is on one of them: names that the output lacks, outputs without a value a sample, memory or a folder that is full.

What a step returned as values by name, one a sample, copied to the host.

Contract: pure functions of the output. The copies are the caller's own, so that a step may use its memory again; those
of an accelerator's tensors may still be under way, into pinned memory. What can go wrong: the output lacks a name, or
something in it has no value a sample (ValueError).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from allstep.coordination import Coordinator, Schema, StateLine
from allstep.engine import Engine, Events
from allstep.errors import MetricError
from allstep.metrics.packing import Packed
from allstep.outputs.parts import Format, Parts, write_part
from allstep.outputs.samples import (
    NOTHING,
    PLACES,
    Column,
    Samples,
    column_of,
    joined,
    payloads_of_all,
    samples_packed,
    samples_unpacked,
)


@dataclass(frozen=True, slots=True)
class _Said:
    """What a rank tells the others before anything is given.

    Attributes:
        manifest: what is needed to read its payload.
        size: bytes of its payload.
        samples: how many it has.
        is_dealt: whether a sampler said where all of them stood.
        missing: iterations at the epoch's beginning that this process did not see.
        failure: why it has nothing to give, if so.
    """

    manifest: list[int]
    size: int
    samples: int
    is_dealt: bool
    missing: int
    failure: str | None


@dataclass(frozen=True, slots=True)
class _Kept:
    """What one iteration gave: where its samples stand, as `Samples` has it, and by name their values."""

    places: torch.Tensor
    values: dict[str, Batch]
    is_dealt: bool


class Gather:
    """Outputs of all ranks in sample order, in `engine.state.gathered` at each epoch's end.

    There it is a mapping from each name to a tensor with a row a sample, or to a list of tensors where shapes differ,
    on the host; "index" has the samples' indices in the dataset, int64, where allstep's loader dealt them. Parts in a
    folder are a `Parts`, which `load()`s that.

    An epoch that a run goes on with in its middle has what was seen of it since this object was attached; what that
    lacks is logged, and "index" tells which samples there are.

    Args:
        names: keys of the step's output; or, where it is a tuple, names for its elements in order; or one for all.
        to: "all" ranks or the "main" one; on the others `state.gathered` is then None.
        folder: where parts are written when what all ranks have is larger than `limit`; seen by all ranks. Each epoch
            has a folder in it, and replaces the parts that another run left there.
        limit: bytes.
        format: of the parts, "npy" or "safetensors".

    Raises:
        ValueError: no name, one twice, or an unknown `to` or `format`.
    """

    def __init__(
        self,
        *names: str,
        to: Literal["all", "main"] = "all",
        folder: Path | str | None = None,
        limit: int = 2**30,
        format: Format = "npy",
    ) -> None:
        if not names or len(set(names)) < len(names) or "index" in names:
            raise ValueError(f"names are {', '.join(names) or 'none'}; give at least one, each once, and not 'index'")
        if to not in ("all", "main"):
            raise ValueError(f"to is {to!r}; it must be 'all' or 'main'")
        if format not in ("npy", "safetensors"):
            raise ValueError(f"format is {format!r}; it must be 'npy' or 'safetensors'")
        self.names = names
        self.to = to
        self.folder = None if folder is None else Path(folder).absolute()
        self.limit = limit
        self.format: Format = format
        self._kept: dict[int, _Kept] = {}  # by the iteration's number in the epoch
        self._epoch = 0
        self._seen = 0  # iterations of the epoch that are in `_kept`, but for those missing at its beginning
        self._missing = 0
        self._devices: set[torch.device] = set()
        self._data: Any = None
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
        engine.extension.reductions.append(self)
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._take)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._gather)
        return self

    def schema(self) -> Schema:
        """What is gathered and how, for ranks to compare when a run begins."""
        files = "" if self.folder is None else f", above {self.limit} bytes in {self.format} files in {self.folder}"
        form = f"{', '.join(self.names)} for {'all ranks' if self.to == 'all' else 'the main rank'}{files}"
        return (StateLine(Events.EPOCH_COMPLETED.name, "Gather", "outputs", form),)

    def _begin(self, engine: Engine) -> None:
        state = engine.state
        done = state.iteration - engine.extension.epoch_began_at
        same = state.epoch == self._epoch and state.dataloader is self._data and self._failure is None
        if same and 0 < done <= self._seen:  # iterations after the place from which the run goes on are run again
            self._kept = {number: kept for number, kept in self._kept.items() if number < done}
        else:
            self._kept, self._missing = {}, done
        self._epoch, self._seen, self._data, self._failure = state.epoch, done, state.dataloader, None

    def _take(self, engine: Engine) -> None:
        state = engine.state
        number = state.iteration - engine.extension.epoch_began_at - 1
        self._seen = number + 1
        if not state.active or state.samples == 0 or self._failure is not None:
            return
        try:
            values = named_outputs(state.output, self.names)
            self._devices |= cuda_devices(state.output)
            self._kept[number] = self._placed(engine, number, values)
        except Exception as error:  # whatever it is, the others have to hear of it
            error.add_note(f"(iteration {state.iteration})")
            self._failure, self._kept = error, {}

    def _placed(self, engine: Engine, number: int, values: dict[str, Batch]) -> _Kept:
        """The outputs of the epoch's batch `number` with where its samples stand."""
        state = engine.state
        samples = len(values[self.names[0]])
        sampler = getattr(state.dataloader, "batch_sampler", None)
        whole = getattr(sampler, "global_length", None) == state.epoch_length
        places = torch.full((samples, PLACES), number, dtype=torch.int64)
        if whole and hasattr(sampler, "indices") and state.dataloader is self._data:
            indices = sampler.indices(number)  # type: ignore[union-attr]
            if len(indices) != samples:
                raise ValueError(f"the output has {samples} samples, but the batch had {len(indices)}")
            places[:, 0] = torch.from_numpy(indices)
            return _Kept(places, values, is_dealt=True)
        return _Kept(places, values, is_dealt=False)

    def _gather(self, engine: Engine) -> None:
        coordinator = engine.coordinator
        own, packed = NOTHING, Packed([], [])
        is_dealt = all(kept.is_dealt for kept in self._kept.values())
        try:
            if self._failure is None:
                own = self._own()
                packed = samples_packed(own, self.names)
        except Exception as error:
            self._failure = error
        said: list[_Said] = coordinator.gather(
            _Said(packed.manifest, packed.size, len(own.places), is_dealt, self._missing, _told(self._failure))
        )
        _raise_failures("outputs could not be gathered", [each.failure for each in said], self._failure)
        _log_missing(engine, max(each.missing for each in said))
        gathered: Any
        if self.folder is not None and sum(each.size for each in said) > self.limit:
            gathered = self._write(coordinator, own, said, self.folder / f"epoch-{engine.state.epoch:04d}")
        else:
            gathered = self._join(coordinator, packed, said)
        engine.state.gathered = gathered  # type: ignore[attr-defined]
        self._kept = {}

    def _own(self) -> Samples:
        kept = [self._kept[number] for number in sorted(self._kept)]
        for device in self._devices:  # copies from there may be under way
            torch.cuda.synchronize(device)
        places = torch.cat([each.places for each in kept]) if kept else NOTHING.places
        return Samples(places, {name: column_of([each.values[name] for each in kept]) for name in self.names})

    def _keeps(self, coordinator: Coordinator) -> bool:
        return self.to == "all" or coordinator.rank == 0

    def _join(self, coordinator: Coordinator, packed: Packed, said: Sequence[_Said]) -> dict[str, Column] | None:
        """Every rank's samples, in memory."""
        found, failure, keeps = None, None, self._keeps(coordinator)
        try:
            payloads = payloads_of_all(coordinator, packed, [each.size for each in said], keeps=keeps)
            if keeps:
                every = [
                    samples_unpacked(each.manifest, payload, self.names)
                    for each, payload in zip(said, payloads, strict=True)
                ]
                found = joined(every, self.names, are_dealt=_are_dealt(said))
        except Exception as error:
            failure = error
        _agree("outputs could not be joined", coordinator, failure)
        return found

    def _write(self, coordinator: Coordinator, own: Samples, said: Sequence[_Said], folder: Path) -> Parts | None:
        """Every rank's samples, in files."""
        failure = None
        try:
            write_part(folder, own, coordinator.rank, coordinator.world_size, self.format)
        except Exception as error:
            failure = error
        _agree("a part could not be written", coordinator, failure)
        samples = sum(each.samples for each in said)
        parts = Parts(folder, self.names, coordinator.world_size, samples, self.format, _are_dealt(said))
        return parts if self._keeps(coordinator) else None


def _log_missing(engine: Engine, missing: int) -> None:
    if missing and engine.coordinator.rank == 0:
        engine.logger.warning(
            "epoch %d was resumed after its iteration %d: what is gathered lacks the outputs of the iterations before",
            engine.state.epoch,
            missing,
        )


def _are_dealt(said: Sequence[_Said]) -> bool:
    return all(each.is_dealt for each in said)


def _agree(what: str, coordinator: Coordinator, failure: Exception | None) -> None:
    """Raise on all ranks when one has failed."""
    _raise_failures(what, coordinator.gather(_told(failure)), failure)


def _told(failure: Exception | None) -> str | None:
    """What other ranks are told of an exception."""
    if failure is None:
        return None
    notes = " ".join(getattr(failure, "__notes__", ()))
    return f"{type(failure).__name__}: {failure} {notes}".rstrip()


def _raise_failures(what: str, failures: Sequence[str | None], own: Exception | None) -> None:
    told = "; ".join(f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure is not None)
    if told:
        raise MetricError(f"{what}: {told}") from own


# One batch of an output: a tensor with a row a sample, or a list with a tensor a sample.
Batch: TypeAlias = torch.Tensor | list[torch.Tensor]


def named_outputs(output: Any, names: Sequence[str]) -> dict[str, Batch]:
    """The values of each name in one step's output: a mapping's by key, a tuple's in order, or the output itself.

    Raises:
        ValueError: a name is missing, numbers of samples differ, or an output has no value a sample.
    """
    if isinstance(output, Mapping):
        missing = [name for name in names if name not in output]
        if missing:
            raise ValueError(f"the output has {', '.join(map(str, output)) or 'no key'} and lacks {', '.join(missing)}")
        named = {name: output[name] for name in names}
    else:
        values = output if isinstance(output, tuple) else (output,)
        if len(values) != len(names):
            raise ValueError(f"the output has {len(values)} elements for the names {', '.join(names)}")
        named = dict(zip(names, values, strict=True))
    found = {name: _on_host(name, value) for name, value in named.items()}
    lengths = {name: len(value) for name, value in found.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"outputs have different numbers of samples: {lengths}")
    return found


def cuda_devices(output: Any) -> set[torch.device]:
    """The devices whose tensors an output has, from which copies to the host may be under way."""
    if isinstance(output, torch.Tensor):
        return {output.device} if output.is_cuda else set()
    if isinstance(output, Mapping):
        output = list(output.values())
    return set().union(*map(cuda_devices, output)) if isinstance(output, list | tuple) else set()


def _on_host(name: str, value: Any) -> Batch:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        if value.ndim == 0:
            raise ValueError(f"output {name!r} is one number; give a tensor with a value a sample")
        return _copied(value)
    if isinstance(value, Mapping):
        raise ValueError(_in_words(name, value))
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ValueError(f"output {name!r} is a {type(value).__name__}; give a tensor, or a list with one a sample")
    return [_sample(name, each) for each in value]


def _sample(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, Mapping):
        raise ValueError(_in_words(f"{name}[0]", value))
    try:
        return _copied(torch.as_tensor(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"output {name!r} has a {type(value).__name__} for a sample: {error}") from error


def _in_words(name: str, value: Mapping[Any, Any]) -> str:
    keys = ", ".join(map(str, value))
    return f"output {name!r} is a mapping of {keys}; have the step return each of these under a name of its own"


def _copied(value: torch.Tensor) -> torch.Tensor:
    if value.device.type == "cpu":
        return value.detach().clone()
    return value.detach().to("cpu", non_blocking=value.is_cuda)  # into pinned memory, without waiting for the device
