"""Whether the copies of a model are still one model: hashes of the parameters that ride in votes.

Contract: `Replicas` has one `ReplicaAudit` for a run over several ranks. Each vote asks it for a number, on all ranks
at the same iteration. Every `interval` iterations one sum over the bits of each parameter is begun on its device, and
the vote after that carries their hash: by then the sums have come to the host, so that nothing waits for a device. At
an epoch's end they are made and said at once. Where ranks said different numbers, all of them call `say_differences`
when they read the vote: one warning names the ranks that differ from most others, and the first parameter in which they
do.

What it sees: parameters that DDP reduces, after a run's first backward pass. A hash is of 20 bits, so that one
difference of a million is seen only the next time. A rank whose values stay apart is always seen then.

What it costs: every `interval` iterations one reading of the parameters, and nothing in a vote.
"""

from __future__ import annotations

import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from struct import pack
from typing import cast

import torch
from torch import nn

from allstep.coordination import Coordinator
from allstep.cuda import copied_ahead, recorded_event
from allstep.errors import ConfigurationError
from allstep.faults.fault import FlippedBit

INTERVAL = 100
"""Iterations between audits, by default. A step reads or writes each parameter many times, an audit reads it once."""

NamedParameters = Iterable[tuple[str, torch.Tensor]]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class BitSums:
    """For each parameter the sum of its elements, read as integers: as it was when this was made.

    Making it waits for no device, and `numbers` only for the sums, not for what was queued behind them on CUDA.

    Attributes:
        iteration: steps that had been done.
        names: of the parameters.
    """

    def __init__(self, iteration: int, parameters: NamedParameters) -> None:
        named = {name: each for name, each in parameters if _has_bits(each)}
        self.iteration = iteration
        by_device: dict[torch.device, list[str]] = {}
        for name, each in named.items():
            by_device.setdefault(each.device, []).append(name)
        self.names = [name for names in by_device.values() for name in names]
        with torch.no_grad():
            self._sums = [_ToHost(torch.stack([_bits(named[name]) for name in names])) for names in by_device.values()]

    @cached_property
    def numbers(self) -> list[int]:
        """The sums, in the order of `names`."""
        return [number for each in self._sums for number in each.read()]

    def hash(self) -> int:
        """One number of all the sums, of whose bits any 20 tell."""
        return zlib.crc32(pack(f"={len(self.numbers)}q", *self.numbers)) if self.names else 0


class ReplicaAudit:
    """The audits of one run.

    Args:
        coordinator: how the ranks of the run agree.
        parameters: gives those that are reduced over ranks, by name.
        is_trained: whether the run has made a backward pass.
        interval: iterations between audits; None to audit at epochs' ends only.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        parameters: Callable[[], NamedParameters],
        is_trained: Callable[[], bool],
        interval: int | None,
    ) -> None:
        self._coordinator = coordinator
        self._parameters = parameters
        self._is_trained = is_trained
        self._interval = interval
        self._begun: BitSums | None = None
        self._said: BitSums | None = None
        self._audited_at = 0
        self._is_told = False

    def number_for_vote(self, iteration: int) -> int:
        """What this rank says in a vote within an epoch, cast after so many iterations; 0 where no audit is due."""
        self._said, self._begun = self._begun, None
        if self._interval is not None and iteration - self._audited_at >= self._interval:
            self._audited_at = iteration
            if self._is_trained():
                self._begun = BitSums(iteration, self._parameters())
        return 0 if self._said is None else self._said.hash()

    def number_at_end(self, iteration: int) -> int:
        """What this rank says in the vote of an epoch's end: as of now."""
        self._begun, self._audited_at = None, iteration
        self._said = BitSums(iteration, self._parameters()) if self._is_trained() else None
        return 0 if self._said is None else self._said.hash()

    def say_differences(self) -> None:
        """Warn, on rank 0, once in a run, who differs and where. Called on all ranks."""
        said = self._said
        mine = (0, {}) if said is None else (said.iteration, dict(zip(said.names, said.numbers, strict=True)))
        by_rank: list[tuple[int, dict[str, int]]] = self._coordinator.gather(mine)
        differing = differences([sums for _, sums in by_rank])
        if not differing or self._coordinator.rank != 0 or self._is_told:
            return
        self._is_told = True
        shown = ", ".join(f"rank {rank}'s {name}" for rank, name in differing.items())
        others = "the other ranks" if 2 * len(differing) < len(by_rank) else f"rank {reference_rank(by_rank)}"
        warnings.warn(
            f"ranks train different models: after iteration {by_rank[0][0]} {shown} is not that of {others}. Something "
            "in the step decides by this rank's own numbers, such as an optimizer that is given a loss which is not "
            "reduced over ranks (LBFGS); or the step trains past DDP, by model.module(x) or inside model.no_sync(); "
            "or it uses only some of the parameters, which needs world.wrap(model, find_unused_parameters=True); or a "
            "device has changed a value by itself: allstep run --preflight compares what devices compute",
            stacklevel=2,
        )


def reference_rank(by_rank: list[tuple[int, dict[str, int]]]) -> int:
    """The first of the ranks that hold what most of them hold."""
    return _reference([sums for _, sums in by_rank])


def differences(by_rank: list[dict[str, int]]) -> dict[int, str]:
    """The ranks that differ from what most of them hold, or where there is no majority from rank 0's; pure.

    Args:
        by_rank: each rank's sums, by parameter.

    Returns:
        For each of those ranks the first parameter that differs.
    """
    standard = by_rank[_reference(by_rank)]
    return {
        rank: next((name for name in standard if each.get(name) != standard[name]), "another set of parameters")
        for rank, each in enumerate(by_rank)
        if each != standard
    }


def _reference(by_rank: list[dict[str, int]]) -> int:
    held = [tuple(each.items()) for each in by_rank]
    most, count = Counter(held).most_common(1)[0]
    return held.index(most) if 2 * count > len(held) else 0


def _has_bits(parameter: torch.Tensor) -> bool:
    plain = parameter.layout is torch.strided and not hasattr(parameter, "device_mesh")
    return plain and parameter.element_size() in _INTEGERS


def flip_bit(modules: Iterable[nn.Module], flipped: FlippedBit) -> None:
    """Do what a rehearsed fault says.

    Raises:
        ConfigurationError: no module has such a parameter, or it has not so many bits.
    """
    named = {name.removeprefix("module."): each for module in modules for name, each in module.named_parameters()}
    parameter = named.get(flipped.parameter)
    if parameter is None or not _has_bits(parameter) or flipped.bit >= 8 * parameter.element_size():
        raise ConfigurationError(
            f"the fault flips bit {flipped.bit} of {flipped.parameter!r}, which the wrapped models do not have; they "
            f"have {', '.join(named) or 'no parameter'}"
        )
    # The highest bit is the sign of the integers that are read.
    bits = 8 * parameter.element_size()
    mask = 1 << flipped.bit if flipped.bit < bits - 1 else -(1 << flipped.bit)
    with torch.no_grad():
        parameter.detach().view(_INTEGERS[parameter.element_size()]).view(-1)[0] ^= mask


def _bits(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().view(_INTEGERS[parameter.element_size()]).sum(dtype=torch.int64)


class _ToHost:
    """A tensor on its way to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._event: torch.Event | None = None
        if tensor.is_cuda:
            self._tensor = copied_ahead(tensor)
            self._event = recorded_event(tensor.device)

    def read(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return cast(list[int], self._tensor.tolist())
