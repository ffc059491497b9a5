"""World: this process' place among the ranks, and what they do together.

Contract: `allstep.init` makes one and makes it the current World; `close`, or the end of its `with` block, ends it. In
between, each method that crosses ranks is called by every rank at the same point. With one rank every method has its
single-process meaning and no process group exists. Used after `close`, methods raise WorldError; attributes stay
readable. When an exception leaves the `with` block nothing waits for the other ranks. The work is in other modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast, overload

import torch
from torch import nn
from torch.utils.data import Dataset

from allstep.coordination import Alone, Coordinator, GroupCoordinator
from allstep.data import Loader, SampleSeeding, make_loader
from allstep.errors import ArgumentError
from allstep.exit_codes import IN_ORDER
from allstep.parallel import (
    LoadedWeights,
    Parameters,
    Precision,
    Rename,
    autocast,
    clip_gradient_norm,
    load_pretrained,
    loss_parallel,
    materialised_later,
    rewrap,
    unify_buffers,
    unwrap,
)
from allstep.placement import DataRanks, MeshShape, Placement, check_nodes
from allstep.planning import Plan
from allstep.protocol.heartbeat import RankActivity
from allstep.protocol.messages import SECTIONS
from allstep.world import current
from allstep.world.collectives import Collectives, Number, Op
from allstep.world.device import choose_transport, step_end
from allstep.world.device_generators import seed_device
from allstep.world.device_mesh import has_dimension, open_mesh, open_model_mesh
from allstep.world.duration import seconds
from allstep.world.failures import Reporter
from allstep.world.internals import WorldInternals
from allstep.world.membership import Membership
from allstep.world.move import placing, to_device
from allstep.world.numbers import to_numbers
from allstep.world.plan_training import plan_training
from allstep.world.process_group import Group
from allstep.world.seed import member_seed, seed_generators
from allstep.world.turns import Turns
from allstep.world.wrapping import wrap_in_world

T = TypeVar("T")

_MAIN_FIRST_LIMIT = timedelta(hours=12)


class World:
    """This process' rank, device and peers; made by `allstep.init`.

    Attributes:
        placement: where the launcher put this process.
        local_rank, local_world_size: this process among those of its node, from 0, and their number.
        node_rank: this node among all, from 0.
        device: this rank's device.
        backend: of the process group; None in a world of one, which has none.
        seed: what `seed_everything` was given last, or None.
        mesh: torch's DeviceMesh with named dimensions; None where `init` was given none.
        data_rank, data_size: this rank's place, from 0, among those that are given different batches, and their number.
            They are `rank` and `world_size` but in a mesh with `tensor`, whose ranks compute each batch together.
        data_ranks: the same as one value.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        group: Group | None,
        timeout: float,
        activity: RankActivity | None = None,
        reporter: Reporter | None = None,
        mesh: MeshShape | None = None,
    ) -> None:
        self.placement = placement
        self.device = device
        self.backend: str | None = group.backend if group is not None else None
        self.seed: int | None = None
        transport = choose_transport(device, group.backend) if group is not None else device
        on_host = None if group is None else group.on_host
        self._collectives = Collectives(self.rank, self.world_size, device, transport, on_host)
        if mesh is not None and mesh.inside_nodes:
            check_nodes(mesh, self._collectives.gather_objects(placement.node_rank))
        self.mesh = open_mesh(mesh, group, device)
        self._model_mesh = open_model_mesh(self.mesh, group)
        self.data_ranks = DataRanks.of(self.rank, self.world_size, 1 if mesh is None else mesh.sharing)
        self.data_rank, self.data_size = self.data_ranks.rank, self.data_ranks.size
        self.local_rank, self.local_world_size = placement.local_rank, placement.local_world_size
        self.node_rank = placement.node_rank
        activity = RankActivity() if activity is None else activity
        coordinator: Coordinator = Alone()
        if group is not None:
            coordinator = GroupCoordinator(
                group.for_agreement,
                group.rank,
                group.world_size,
                activity,
                device_type=transport.type,
                sharing=self.data_ranks.sharing,
            )
        self._internals = WorldInternals(coordinator, activity, reporter, end_step=step_end(device))
        self._turns = Turns(placement, group, activity)
        self._membership = Membership(self, placement, group, self._internals, timeout)

    @staticmethod
    def current() -> World | None:
        """The World that is open in this process, or None."""
        return cast("World | None", current.current())

    @property
    def rank(self) -> int:
        """This process among all, from 0."""
        return self.placement.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.placement.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.rank == 0

    # Models and data

    def wrap(self, module: nn.Module, **options: Any) -> nn.Module:
        """Move a module to this rank's device and, when there are peers, wrap it in DDP, or shard it over the mesh.

        Args and errors as in `allstep.parallel.wrap_module`, and those of `shard_module` there. What says how a model
        is put in parts, `units` and `reshard_after_forward`, means nothing in a mesh without `shard`. There
        `precision` has forward passes be in autocast. For "float8" see `allstep.parallel.linears_in_float8`.
        """
        self._membership.check_open("wrap")
        with self._membership.waits("wrap"):
            return wrap_in_world(
                module, self.device, self.world_size, self.mesh, self._model_mesh, self._internals, options
            )

    def plan(self, module: nn.Module, batch: Any, **options: Any) -> Plan:
        """What training a module takes on each rank, memory and messages: a step is run without values or devices.

        Not collective. Nothing is changed. Args and errors as in `allstep.world.plan_training`: `mesh`, `ranks`,
        `step`, `optimizer`, `accumulate`, `memory`, and the options of `wrap`.
        """
        self._membership.check_open("plan")
        return plan_training(module, batch, device=self.device, world_size=self.world_size, opened=self.mesh, **options)

    def unwrap(self, module: nn.Module) -> nn.Module:
        """The user's own module inside DDP and torch.compile; what to save and to evaluate on one rank.

        Its buffers are one model's at each end of an engine's epoch and at the start of each run; see `unify_buffers`.
        """
        self._membership.check_open("unwrap")
        return unwrap(module)

    def rewrap(self, module: nn.Module) -> None:
        """Have DDP follow parameters of a wrapped module that were frozen, unfrozen, added, replaced or cast since.

        Collective; args and errors as in `allstep.parallel.rewrap`. An engine does it by itself where an epoch starts.
        """
        with self._membership.collective("rewrap"):
            if self.world_size > 1:
                rewrap(module)

    def unify_buffers(self, module: nn.Module) -> None:
        """Give a module's buffers, such as BatchNorm's statistics, the values of rank 0; wrapped or not. Collective."""
        with self._membership.collective("unify_buffers"):
            if self.world_size > 1:
                unify_buffers(module)

    def building(self, *, meta: bool | None = None) -> AbstractContextManager[None]:
        """Build a model here that is to be wrapped.

        Args:
            meta: build it on the meta device, without values, so that no rank holds all of it: `wrap` gives each rank
                the values of its part. By default where the mesh has `shard`. See `allstep.parallel.meta_weights` for
                what a model has to have for that.
        """
        self._membership.check_open("building")
        is_later = has_dimension(self.mesh, "shard") if meta is None else meta
        return materialised_later() if is_later else nullcontext()

    def load_pretrained(
        self, module: nn.Module, folder: str | Path, *, strict: bool = True, rename: Rename | None = None
    ) -> LoadedWeights:
        """Fill a model from safetensors files as the Hugging Face hub lays them out; each rank reads its own parts.

        Args and errors as in `allstep.parallel.load_pretrained`.
        """
        self._membership.check_open("load_pretrained")
        return load_pretrained(module, folder, strict=strict, rename=rename)

    def clip_grad_norm_(
        self, parameters: Parameters, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Clip gradients by their norm, right over any mesh; returns the norm, a tensor that nothing waits for.

        Collective where the model is in parts; args and errors as in `allstep.parallel.clip_gradient_norm`.
        """
        with self._membership.collective("clip_grad_norm_"):
            return clip_gradient_norm(parameters, max_norm, norm_type, error_if_nonfinite=error_if_nonfinite)

    def autocast(self, precision: Precision = "bf16") -> AbstractContextManager[object]:
        """Context for a forward pass and its loss in mixed precision on this rank's device: "bf16", "fp16", or "no".

        Make a new one for each step. Raises ParallelError for any other precision.
        """
        return autocast(self.device.type, precision)

    def loss_parallel(self) -> AbstractContextManager[None]:
        """Context for a cross entropy of logits that stay divided over the mesh's `tensor`, and its backward pass.

        It is torch's of that name, and the loss a DTensor; see `allstep.parallel.whole_tensor`. Where the mesh has no
        `tensor` it does nothing.
        """
        return loss_parallel() if has_dimension(self.mesh, "tensor") else nullcontext()

    def to_device(self, value: T) -> T:
        """Move all tensors of a nested structure to this rank's device; see `allstep.world.to_device`."""
        self._membership.check_open("to_device")
        return to_device(value, self.device)

    def to_numbers(self, value: Any) -> Any:
        """Results such as `state.metrics` in plain numbers, for JSON and logs; see `allstep.world.to_numbers`."""
        return to_numbers(value)

    def loader(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        max_batch_per_rank: int | None = None,
        shuffle: bool = False,
        sampler: Iterable[int] | None = None,
        drop_last: bool = False,
        sample_seeding: SampleSeeding | None = None,
        seed: int | None = None,
        **dataloader_options: Any,
    ) -> Loader:
        """This rank's part of a dataset, as a torch DataLoader.

        Args and errors as in `allstep.data.make_loader`. `batch_size` is of a rank, `global_batch_size` of all; give
        one of them. `seed` is by default this World's, or 0.
        """
        self._membership.check_open("loader")
        return make_loader(
            dataset,
            rank=self.data_rank,
            world_size=self.data_size,
            seed=seed if seed is not None else self.seed or member_seed(0),
            batch_size=batch_size,
            global_batch_size=global_batch_size,
            max_batch_per_rank=max_batch_per_rank,
            shuffle=shuffle,
            sampler=sampler,
            drop_last=drop_last,
            sample_seeding=sample_seeding,
            device_type=self.device.type,
            place=placing(self.device),
            **dataloader_options,
        )

    # Collectives

    @overload
    def all_reduce(self, x: torch.Tensor, op: Op = "sum") -> torch.Tensor: ...
    @overload
    def all_reduce(self, x: Number, op: Op = "sum") -> Any: ...
    def all_reduce(self, x: torch.Tensor | Number, op: Op = "sum") -> Any:
        """Reduce a tensor or number over all ranks; every rank gets the result.

        A number is reduced exactly: ints to an int of any size, floats in float64 with one rounding, ranks may mix the
        two, and `"mean"` is a float. A tensor must have the same shape and dtype on all ranks, any dtype and device;
        the result is a new tensor there. Integer and bool tensors add and multiply in int64 and stay int64, as in
        torch, wrapping beyond it; their `"mean"` is float64; 16-bit floats are added in float32 and rounded once.

        Args:
            x: a tensor, int, float or bool. An int on input is at most 64 bits.
            op: `"sum"`, `"mean"`, `"min"`, `"max"` or `"product"`.

        Raises:
            CollectiveError: an unknown op, or what no backend carries.
        """
        with self._membership.collective("all_reduce"):
            return self._collectives.all_reduce(x, op)

    @overload
    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]: ...
    @overload
    def all_gather(self, x: Number) -> list[Any]: ...
    def all_gather(self, x: torch.Tensor | Number) -> list[Any]:
        """The tensors or numbers of all ranks, in rank order, on every rank.

        Shapes and dtypes may differ. Tensors come back bit for bit on the device of this rank's `x`.

        Raises:
            CollectiveError: a rank gave something else, on all ranks.
        """
        with self._membership.collective("all_gather"):
            return self._collectives.all_gather(x)

    @overload
    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor: ...
    @overload
    def broadcast(self, x: Number | None, src: int = 0) -> Any: ...
    def broadcast(self, x: torch.Tensor | Number | None, src: int = 0) -> Any:
        """The tensor or number of rank `src`, on every rank.

        The other ranks need not know its shape or dtype; what they give counts only for its device: the result is on
        the device of the tensor they gave, else on this rank's.

        Raises:
            CollectiveError: `src` is no rank, or its `x` is neither tensor nor number, on all ranks.
        """
        with self._membership.collective("broadcast"):
            return self._collectives.broadcast(x, src)

    def gather_objects(self, value: T) -> list[T]:
        """One object of each rank, in rank order, on every rank.

        Objects are pickled: keep them small, and put tensors in them on the CPU.

        Raises:
            CollectiveError: an object cannot be pickled, on all ranks.
        """
        with self._membership.collective("gather_objects"):
            return self._collectives.gather_objects(value)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        with self._membership.collective("barrier"):
            self._collectives.barrier()

    @contextmanager
    def main_first(self, *, local: bool = False, timeout: float | timedelta = _MAIN_FIRST_LIMIT) -> Iterator[None]:
        """Run the body on the main rank, then on all others: a download, a preprocessing step that leaves a cache.

        If the body raises on the main rank, the others run theirs all the same and the exception goes on there.

        Args:
            local: each node's local rank 0 goes first on its node, for what lies on a disk of the node.
            timeout: seconds, or a timedelta, that the others wait; 12 hours by default.

        Raises:
            ArgumentError: the timeout is no positive duration.
            WorldError: the first rank did not finish in time or is gone, on the others.
        """
        self._membership.check_open("main_first")
        limit = seconds("timeout", timeout)
        with self._turns.take(local=local, timeout=limit, waits=self._membership.waits("main_first")):
            yield

    # The rest of a script

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Say that the body is work of another kind than a step, so that it is measured and limited as such.

        The watchdog learns how long each kind of work takes and ends a run in which one takes far too long. A handler
        that writes a checkpoint itself does it in `with world.section("checkpoint"):`.

        Args:
            name: "data", "step", "evaluation", "checkpoint" or "handler".

        Raises:
            ArgumentError: there is no such section.
        """
        self._membership.check_open("section")
        if name not in SECTIONS:
            raise ArgumentError(f"section is {name!r}; it must be one of {', '.join(map(repr, SECTIONS))}")
        with self._internals.activity.section(name):
            yield

    def print(self, *values: object, **options: Any) -> None:
        """`print` on the main rank, flushed; nothing on the others."""
        self._membership.check_open("print")
        if self.is_main:
            print(*values, **{"flush": True, **options})

    def seed_everything(self, seed: int, *, per_rank: bool = False) -> int:
        """Seed Python's, numpy's and torch's generators, on all devices, and this World's loaders.

        Args:
            seed: 0 to 2^63 - 1, the same on all ranks.
            per_rank: give each data rank a stream of its own, derived from (seed, data_rank). Without it all ranks draw
                the same numbers: right while a model is built and wherever ranks must decide alike. With it ranks draw
                different dropout masks and noise, and those that compute one batch together the same: right for
                training. Call it once each way, in this order.

        Returns:
            The seed; in a member of an array of jobs (`allstep submit --array`) one derived from it and the member.

        Raises:
            ArgumentError, ArgumentTypeError: the seed is out of range or no integer.
        """
        self._membership.check_open("seed_everything")
        # `self.seed` stays the common one: loaders must deal the same order on all ranks.
        self.seed = member_seed(seed)
        given = seed_generators(self.seed, self.data_rank if per_rank else None)
        if self.device.type == "xla":  # which `torch.manual_seed` does not reach
            seed_device(self.device, given)
        return self.seed

    # The end

    def close(self) -> None:
        """End the World and its process group (an adopted group stays). Rank 0 waits for the others; twice is once."""
        self._membership.leave(failed=False)

    def __enter__(self) -> World:
        self._membership.check_open("with")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._internals.note_exception(error)
        # An exit with one of these codes is taken by all ranks alike: they leave in order.
        failed = error is not None and not (isinstance(error, SystemExit) and error.code in (None, *IN_ORDER))
        self._membership.leave(failed=failed)

    def __repr__(self) -> str:
        state = ", closed" if self._membership.closed else ""
        place = f"rank={self.rank}, world_size={self.world_size}"
        return f"World({place}, device={self.device}, backend={self.backend}{state})"


def internals(world: World) -> WorldInternals:
    """The inner parts of a World, for the packages above this one; scripts do not need them."""
    return world._internals
