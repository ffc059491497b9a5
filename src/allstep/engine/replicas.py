"""The modules in DDP that a run trains: seen when they change, and made one model where somebody looks at it.

Contract: a run over several ranks has one `Replicas`. In a vote that is waited for, which is where an epoch starts or
before each group with `window=1`, a rank says whether its modules have changed since they were wrapped. Where some
have, all ranks tell each other what, in one more collective. If they say the same, the modules are wrapped again in
place; if not, all raise `DivergenceError`. Within an epoch votes are cast a window ahead, so nothing can be agreed in
time: there `check` raises `ModelChangedError` on the rank that sees a change.

`unify_buffers` makes buffers rank 0's on all ranks, as DDP's next forward pass would: before a run (an evaluation is
one), before the handlers of an epoch's end, and before those of the run's end.

`audit` compares the parameters that are reduced (`replica_audit`).

What it costs: a comparison of one flag a parameter in each vote, and a walk through the modules at an epoch's start and
at most four times a second. `backward_passes` is a count that each vote
carries.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from time import monotonic
from typing import NoReturn

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allstep.coordination import Coordinator
from allstep.diagnosis.backward_passes import advise_passes
from allstep.engine.replica_audit import ReplicaAudit
from allstep.errors import DataError, DivergenceError, ModelChangedError
from allstep.parallel import Replica, broadcasts_buffers, in_short, is_fully_sharded, unify_buffers
from allstep.protocol.heartbeat import RankActivity
from allstep.world import World, internals

_WALK_EVERY_S = 0.25
_UNUSED = "Expected to have finished reduction in the prior iteration"  # how DDP's error about unused parameters begins
_ONE_SAMPLE = "Expected more than 1 value per channel"  # how torch's error about BatchNorm begins


class Replicas:
    """The wrapped modules of one run over several ranks.

    Args:
        modules: whose gradients the step's backward passes reduce.
        unreduced: what `World.wrap` gave without DDP, because it had nothing to train then.
        coordinator: how the ranks of the run agree.
        activity: told while this rank waits for the others' buffers.
        audit: iterations between comparisons of parameters; None for one at each epoch's end alone.

    Attributes:
        audit: compares the parameters that are reduced.
        names: by which ranks tell each other which of these modules they have.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        unreduced: Iterable[nn.Module],
        coordinator: Coordinator,
        activity: RankActivity,
        audit: int | None,
    ) -> None:
        self._named_modules = dict(modules)
        self._modules = list(modules.values())
        self._replicas = [each for each in self._modules if isinstance(each, Replica)]
        self._unreduced = list(unreduced)
        self._coordinator = coordinator
        self._activity = activity
        self._passes_before = self._count_passes()
        self.audit = ReplicaAudit(coordinator, self._reduced, self._is_trained, audit)
        self._walked_at = 0.0

    @property
    def names(self) -> frozenset[str]:
        """By which ranks tell each other which of these modules they have."""
        return frozenset(self._named_modules)

    def keep(self, names: Container[str]) -> None:
        """Leave out modules that some rank has no more.

        A model that a script has let go of stays until the garbage collector comes by, which is not at the same time on
        all ranks; and what only some ranks have can be in no collective.
        """
        self._named_modules = {name: each for name, each in self._named_modules.items() if name in names}
        self._modules = list(self._named_modules.values())
        self._replicas = [each for each in self._modules if isinstance(each, Replica)]
        self._unreduced = [each for each in self._unreduced if each in self._modules]
        self._passes_before = self._count_passes()

    # Changes

    def have_changed(self, *, at_start: bool) -> bool:
        """Whether the modules have changed since they were wrapped.

        Args:
            at_start: an epoch starts, so that all modules are walked through. Otherwise that is done now and then, and
                each time only the flags of known parameters are compared.
        """
        now = monotonic()
        if at_start or now - self._walked_at > _WALK_EVERY_S:
            self._walked_at = now
            return bool(self._changes())
        return any(each.has_new_flags() for each in self._replicas) and bool(self._changes())

    def check(self) -> None:
        """Raise ModelChangedError where modules have changed within an epoch."""
        if self.have_changed(at_start=False):
            raise ModelChangedError(
                "a wrapped model has changed within an epoch, and in some of the last iterations its gradients were "
                f"not reduced over ranks: {in_short(self._changes())}. Change it between epochs, in a handler of "
                "EPOCH_COMPLETED or EPOCH_STARTED, where ranks wrap it again by themselves, or call "
                "world.rewrap(model) on every rank right behind the change"
            )

    def settle(self) -> None:
        """Some rank's modules have changed: compare, and wrap them again. Called on all ranks."""
        said: list[list[str]] = self._coordinator.gather(self._changes())
        if any(each != said[0] for each in said):
            shown = "; ".join(f"rank {rank}: {in_short(each) or 'nothing'}" for rank, each in enumerate(said))
            raise DivergenceError(
                f"ranks have changed their models differently: {shown}. Make the same change on every rank, at the "
                "same place"
            )
        self._check_all_are_reduced()
        for each in self._replicas:
            if each.changes():
                each.rewrap()

    def _changes(self) -> list[str]:
        changes = [self._named(each, clause) for each in self._replicas for clause in each.changes()]
        return changes + self._trained_alone()

    def _named(self, replica: Replica, clause: str) -> str:
        return clause if len(self._replicas) == 1 else f"{type(replica.module).__name__}: {clause}"

    def _trained_alone(self) -> list[str]:
        """Parameters that require gradients, of modules which had none of these when they were wrapped."""
        found = [
            (module, name, each)
            for module in self._unreduced
            for name, each in module.named_parameters()
            if each.requires_grad
        ]
        if not found:
            return []
        # The module may have become a part of another one, or have been wrapped once more.
        reduced = {
            id(each) for module in self._modules if module not in self._unreduced for each in module.parameters()
        }
        return [
            f"{type(module).__name__}: {name} requires gradients now"
            for module, name, each in found
            if id(each) not in reduced
        ]

    def _check_all_are_reduced(self) -> None:
        if alone := self._trained_alone():
            raise ModelChangedError(
                f"{in_short(alone)}, but the module had nothing to train when it was wrapped, so it is not in DDP. "
                "Wrap it when it is to be trained, and use what that returns: model = world.wrap(module)"
            )

    # Backward passes

    @property
    def backward_passes(self) -> int:
        """Backward passes of the run that reduced gradients."""
        return self._count_passes() - self._passes_before

    def _count_passes(self) -> int:
        return sum(each.backward_passes for each in self._replicas)

    def say_passes_differ(self, all_passes: int) -> NoReturn:
        """Raise DivergenceError: the ranks have made `all_passes` together, and not the same number each.

        Nothing is gathered: a rank that has made more passes is waiting in one for a rank that has made less.
        """
        rank, world_size, activity = self._coordinator.rank, self._coordinator.world_size, self._activity
        others = dict.fromkeys(range(world_size), 0)
        raise DivergenceError(
            "ranks have made different numbers of backward passes, so that gradients of different iterations were "
            f"mixed: rank {rank} made {self.backward_passes}, and the {world_size} ranks together {all_passes}. "
            + advise_passes(others | {rank: activity.left_out}, {rank: activity.most_passes})
        )

    # Audits

    def _is_trained(self) -> bool:
        return self.backward_passes > 0 or any(each.grad is not None for _, each in self._reduced())

    def _reduced(self) -> Iterator[tuple[str, nn.Parameter]]:
        for each in self._replicas:
            for name, parameter in each.module.named_parameters():
                if parameter.requires_grad and name not in each.parameters_to_ignore:
                    yield name, parameter

    # Buffers

    def unify_buffers(self) -> None:
        """Make the buffers that DDP broadcasts, and those of models in parts, those of rank 0, on all ranks."""
        for each in self._modules:
            if broadcasts_buffers(each) or (is_fully_sharded(each) and any(True for _ in each.buffers())):
                with self._activity.wait("buffers"):
                    unify_buffers(each)

    # What can go wrong in a step

    def raise_explained(self, error: Exception, iteration: int) -> None:
        """Raise what explains an exception of a step that several ranks alone make; return where nothing is known."""
        if isinstance(error, ModelChangedError):
            return
        if _ONE_SAMPLE in str(error):
            raise DataError(
                f"rank {self._coordinator.rank} has one value for each channel in iteration {iteration}, and BatchNorm "
                "cannot take statistics of one. Choose a global batch size of which every rank gets two samples or "
                "more, and drop_last=True where the last batch is smaller; or give the model a normalisation without "
                "statistics of the batch, such as GroupNorm, or sync_batchnorm=True on CUDA"
            ) from error
        if _UNUSED in str(error) and not self._changes() and (names := self._without_gradients(str(error))):
            raise ModelChangedError(
                f"on rank {self._coordinator.rank} {in_short(names)} got no gradient in the iteration before iteration "
                f"{iteration}, and DDP waits for one of each parameter. Wrap a model that does not use all of them "
                "each time by world.wrap(model, find_unused_parameters=True)"
            ) from error
        if isinstance(error, RuntimeError) and (changes := self._changes()):
            raise ModelChangedError(
                f"a wrapped model has changed, and DDP failed in iteration {iteration}: {in_short(changes)}. Change "
                "it between epochs, in a handler of EPOCH_COMPLETED or EPOCH_STARTED, or call world.rewrap(model) on "
                "every rank right behind the change"
            ) from error

    def _without_gradients(self, text: str) -> list[str]:
        """Names of the parameters that DDP's error tells the places of; empty where several models may be meant."""
        reduced = [name for name, _ in self._reduced()]
        places = _indices(text) if len(self._replicas) == 1 else []
        return [reduced[at] for at in places if at < len(reduced)]


def _indices(text: str) -> list[int]:
    """The parameters that DDP's error about unused ones names, by their places among those that it reduces."""
    found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", text)
    return [] if found is None else list(map(int, found[1].split()))


def modules_in_step(
    given: Iterable[nn.Module], coordinator: Coordinator, audit: int | None
) -> tuple[list[nn.Module], Replicas | None]:
    """The modules whose gradients a step's backward passes reduce, and what the ranks of a run say of them.

    Args:
        given: modules of the engine, besides those that the current World has wrapped.
        coordinator: how the ranks of the run agree. Where these are not all ranks of the World, or one alone, there are
            no `Replicas`: the collectives of a model are those of all its ranks.
    """
    world = World.current()
    inner = None if world is None else internals(world)
    numbered = {} if inner is None else inner.numbered_modules()
    wrapped = list(numbered.values())
    modules = list(dict.fromkeys([*wrapped, *given]))
    if coordinator.world_size == 1 or (world is not None and coordinator.world_size != world.world_size):
        return modules, None
    unreduced = [each for each in wrapped if not (isinstance(each, DistributedDataParallel) or is_fully_sharded(each))]
    if world is not None and world.data_size == 1:  # all ranks compute every batch together: nothing is to be reduced
        unreduced = []
    activity = RankActivity() if inner is None else inner.activity
    names = {module: f"wrapped {number}" for number, module in numbered.items()}
    named = {names.get(module, f"given {at - len(wrapped)}"): module for at, module in enumerate(modules)}
    return modules, Replicas(named, unreduced, coordinator, activity, audit)
