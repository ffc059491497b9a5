"""`Gather`: the outputs of all ranks, joined in the order of the samples.

Contract: attached to one engine before its run, on every rank alike. Each iteration of this rank's own is kept on the
host; at the epoch's end ranks tell each other how much they have, and then either give each other all of it, in pieces,
or, where that is more than the limit and a folder was given, write a part each. Over allstep's own loader the sampler
says by arithmetic which sample stood where, so that the order is the dataset's at any world size; over other data it is
by iteration, then rank. What can go wrong is raised on all ranks alike: names that the output lacks, outputs without a
sample each, a part that cannot be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from allstep.coordination import Coordinator
from allstep.engine import Engine, Events
from allstep.errors import MetricError
from allstep.metrics.packing import Packed, element_parts, elements_of, padded
from allstep.metrics.parts import Format, Parts, write_part
from allstep.metrics.samples import PLACES, Column, Samples, column_of, in_order

PIECE = 64 * 2**20


@dataclass(frozen=True, slots=True)
class _Said:
    """What a rank tells the others before anything is given.

    Attributes:
        names: what it gathers.
        manifest: what is needed to read its payload.
        size: bytes of its payload.
        samples: how many it has.
        is_dealt: whether a sampler said where all of them stood.
        failure: why it has nothing to give, if so.
    """

    names: tuple[str, ...]
    manifest: list[int]
    size: int
    samples: int
    is_dealt: bool
    failure: str | None


class Gather:
    """Outputs of all ranks in sample order, in `engine.state.gathered` at each epoch's end.

    There it is a mapping from each name to a tensor with a row a sample, or to a list of tensors where shapes differ,
    on the host; "index" has the samples' indices in the dataset, int64, where allstep's loader dealt them. Parts in a
    folder are a `Parts`, which `load()`s that.

    Args:
        names: keys of the step's output; or, where it is a tuple, names for its elements in order; or one for all.
        to: "all" ranks or the "main" one; on the others `state.gathered` is then None.
        folder: where parts are written when what all ranks have is larger than `limit`; seen by all ranks. Each epoch
            has a folder in it.
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
        self.folder = None if folder is None else Path(folder)
        self.limit = limit
        self.format: Format = format
        self._batches: dict[str, list[Any]] = {}
        self._places: list[torch.Tensor] = []
        self._data: Any = None
        self._is_dealt = True
        self._failure: str | None = None

    def attach(self, engine: Engine) -> Gather:
        """Keep the outputs of `engine`, and gather them when its epochs end. Raises MetricError while it is running."""
        if engine.is_running:
            raise MetricError("the engine is running; attach a Gather before run(), on every rank alike")
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._take)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._gather)
        return self

    def _begin(self, engine: Engine) -> None:
        if engine.state.iteration > engine.progress.epoch_began_at:  # a run goes on in the middle of an epoch
            return
        self._batches = {name: [] for name in self.names}
        self._places, self._failure = [], None
        self._data, self._is_dealt = engine.state.dataloader, True

    def _take(self, engine: Engine) -> None:
        state = engine.state
        if not state.active or state.samples == 0 or self._failure is not None:
            return
        try:
            outputs = {name: _on_host(value) for name, value in self._named(state.output).items()}
            places = self._where(engine, len(outputs[self.names[0]]))
        except (KeyError, TypeError, ValueError) as error:
            self._failure = f"iteration {state.iteration}: {error}"
            return
        self._places.append(places)
        for name, value in outputs.items():
            self._batches[name].append(value)

    def _named(self, output: Any) -> dict[str, Any]:
        if isinstance(output, Mapping):
            missing = [name for name in self.names if name not in output]
            if missing:
                raise KeyError(f"the output has {', '.join(map(str, output))} and lacks {', '.join(missing)}")
            named = {name: output[name] for name in self.names}
        else:
            values = output if isinstance(output, tuple) else (output,)
            if len(values) != len(self.names):
                raise ValueError(f"the output has {len(values)} elements for the names {', '.join(self.names)}")
            named = dict(zip(self.names, values, strict=True))
        lengths = {name: len(value) for name, value in named.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"outputs have different numbers of samples: {lengths}")
        return named

    def _where(self, engine: Engine, samples: int) -> torch.Tensor:
        """Where the samples of the present batch stand."""
        state = engine.state
        number = state.iteration - engine.progress.epoch_began_at - 1
        sampler = getattr(state.dataloader, "batch_sampler", None)
        whole = getattr(sampler, "global_length", None) == state.epoch_length
        places = torch.zeros((samples, PLACES), dtype=torch.int64)
        if whole and hasattr(sampler, "indices") and state.dataloader is self._data:
            indices = sampler.indices(number)  # type: ignore[union-attr]
            if len(indices) != samples:
                raise ValueError(f"the output has {samples} samples, but the batch had {len(indices)}")
            places[:, 0] = torch.from_numpy(indices)
            return places
        self._is_dealt = False
        places[:, 0], places[:, 1] = number, engine.coordinator.rank
        places[:, 2] = torch.arange(samples)
        return places

    def _gather(self, engine: Engine) -> None:
        coordinator = engine.coordinator
        own, packed = self._own(), Packed([], [])
        if self._failure is None:
            packed = Packed(*_packed(own, self.names))
        said: list[_Said] = coordinator.gather(
            _Said(self.names, packed.manifest, packed.size, len(own.places), self._is_dealt, self._failure)
        )
        _check_said(said)
        if self.folder is not None and sum(each.size for each in said) > self.limit:
            folder = self.folder / f"epoch-{engine.state.epoch:04d}"
            self._write(coordinator, own, folder)
            samples = sum(each.samples for each in said)
            gathered: Any = Parts(folder, self.names, coordinator.world_size, samples, self.format)
        else:
            keeps = self.to == "all" or coordinator.rank == 0
            payloads = _payloads(coordinator, packed, [each.size for each in said], keeps=keeps)
            every = [
                _unpacked(each.manifest, payload, self.names) for each, payload in zip(said, payloads, strict=True)
            ]
            gathered = self._joined(every, dealt=all(each.is_dealt for each in said)) if keeps else None
        engine.state.gathered = gathered  # type: ignore[attr-defined]
        self._batches, self._places = {name: [] for name in self.names}, []

    def _own(self) -> Samples:
        if any(value.is_pinned() for of_name in self._batches.values() for value in _tensors(of_name)):
            torch.cuda.synchronize()  # for the copies that `_on_host` began
        places = torch.cat(self._places) if self._places else torch.zeros((0, PLACES), dtype=torch.int64)
        return Samples(places, {name: column_of(self._batches[name]) for name in self.names})

    def _joined(self, every: Sequence[Samples], *, dealt: bool) -> dict[str, Column]:
        joined = in_order(every, self.names)
        if dealt:
            joined["index"] = torch.cat([part.places[:, 0] for part in every]).sort().values
        return joined

    def _write(self, coordinator: Coordinator, own: Samples, folder: Path) -> None:
        failure = None
        try:
            write_part(folder, own, coordinator.rank, coordinator.world_size, self.format)
        except (OSError, ValueError) as error:
            failure = str(error)
        _raise_failures("a part could not be written", coordinator.gather(failure))


def _packed(samples: Samples, names: Sequence[str]) -> tuple[list[int], list[torch.Tensor]]:
    manifest: list[int] = []
    parts = element_parts([samples.places], manifest)
    for name in names:
        column = samples.columns[name]
        ragged = isinstance(column, list)
        elements = column if isinstance(column, list) else [column]
        manifest += [ragged, len(elements)]
        parts += element_parts(elements, manifest)
    return manifest, parts


def _unpacked(manifest: Sequence[int], payload: torch.Tensor | None, names: Sequence[str]) -> Samples:
    if payload is None:
        return Samples(torch.zeros((0, PLACES), dtype=torch.int64), {name: [] for name in names})
    numbers = iter(manifest)
    elements = elements_of(numbers, payload, 0)
    places = next(elements)
    columns: dict[str, Column] = {}
    for name in names:
        ragged, count = next(numbers), next(numbers)
        found = [next(elements) for _ in range(count)]
        columns[name] = found if ragged else found[0]
    return Samples(places, columns)


def _payloads(
    coordinator: Coordinator, packed: Packed, sizes: Sequence[int], *, keeps: bool
) -> list[torch.Tensor | None]:
    """Every rank's payload, given in pieces so that a rank that keeps none never holds much more than one."""
    longest = max(sizes)
    own = torch.empty(longest, dtype=torch.uint8)
    packed.write(own)
    if coordinator.world_size == 1:
        return [own]
    kept: list[torch.Tensor | None] = [
        torch.empty(padded(size), dtype=torch.uint8) if keeps else None for size in sizes
    ]
    for at in range(0, longest, PIECE):
        rows = coordinator.gather_bytes(own[at : at + PIECE])
        for whole, row in zip(kept, rows, strict=True):
            if whole is not None and at < len(whole):
                piece = whole[at : at + PIECE]
                piece.copy_(row[: len(piece)])
    return kept


def _check_said(said: Sequence[_Said]) -> None:
    _raise_failures("outputs could not be gathered", [each.failure for each in said])
    for rank, each in enumerate(said):
        if each.names != said[0].names:
            first, other = ", ".join(said[0].names), ", ".join(each.names)
            raise MetricError(
                f"ranks gather different outputs: {first} on rank 0, {other} on rank {rank}. Give the Gather of every "
                "rank the same names"
            )


def _raise_failures(what: str, failures: Sequence[str | None]) -> None:
    told = "; ".join(f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure is not None)
    if told:
        raise MetricError(f"{what}: {told}")


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", non_blocking=True)
    return [_on_host(torch.as_tensor(each)) for each in value]


def _tensors(batches: Sequence[Any]) -> list[torch.Tensor]:
    return [each for batch in batches for each in ([batch] if isinstance(batch, torch.Tensor) else batch)]
