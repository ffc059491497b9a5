"""Why an interrupted run is not the unbroken one, as far as traces tell. Pure.

Contract: `probable_causes` gives sentences, each with what to do, the first thing that is wrong first. They are asked
for only where a rehearsal did not turn out well. What is looked at, in this order:
1. whether anything was saved, where, and whether the run went on from it;
2. whether two runs of the script are the same as long as nothing interrupts them;
3. what a start had when it began, compared with what the start before had when that was saved;
4. whether unbroken runs at two numbers of ranks take the same samples;
5. the samples and the random numbers of the first iteration after the interruption.
Each of these would make what comes behind it differ too, so that the first that is found is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from allstep.rehearsal.iteration_trace import GENERATORS, SAMPLES, Parting, RunTrace, first_parting

_UNSEEDED = "seed it, as allstep.init(seed=0) does for weights, the order of data and all else that draws"
_RESTORED = {
    "parameters": (
        "the weights are not those that were saved: call checkpoint.resume() after the model was made, filled and "
        "wrapped, and nothing behind it that changes them"
    ),
    "optimizers": (
        "the optimizer's state (its moments) is not what it was when the run was saved: give the optimizer to the "
        "Checkpoint, under a name of its own, and make it before checkpoint.resume()"
    ),
    "options": (
        "the optimizer's options (such as its learning rate) are not what they were when the run was saved: give the "
        "optimizer and its scheduler to the Checkpoint, and set nothing of them behind checkpoint.resume()"
    ),
    "schedulers": (
        "a scheduler is not where it was when the run was saved: give it to the Checkpoint, and make it before "
        "checkpoint.resume()"
    ),
}
_OWN_GENERATORS = (
    "a generator of the script's own (torch.Generator, numpy.random.Generator) is not where it was when the run was "
    "saved: give it to the Checkpoint"
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a rehearsal.

    Args:
        first: the interrupted run up to the interruption.
        second: the same afterwards.
        unbroken: the run that nothing interrupted.
        again: the same once more; empty where it was not run.
        other_size: an unbroken run at the number of ranks afterwards; empty where that is the same.
        saved: the iteration that was saved when the first start ended; None for nothing.
        stopped: whether it ended by itself when it was told to.
        told: whether it was told to; a failure comes unannounced.
        objects: what is saved, by name.
    """

    first: RunTrace
    second: RunTrace = field(default_factory=RunTrace)
    unbroken: RunTrace = field(default_factory=RunTrace)
    again: RunTrace = field(default_factory=RunTrace)
    other_size: RunTrace = field(default_factory=RunTrace)
    saved: int | None = None
    stopped: bool = True
    told: bool = True
    objects: Sequence[str] = ()


def probable_causes(evidence: Evidence) -> tuple[str, ...]:
    """What is probably wrong with the script; never empty."""
    for look in (_not_gone_on, _not_the_same_twice, _not_restored, _other_at_other_size, _other_course):
        if found := look(evidence):
            return tuple(found)
    return (
        "the traces show no cause: until the runs part they had the same weights, optimizers, schedulers, samples and "
        "random numbers; look for state that the script keeps elsewhere",
    )


def is_explained(evidence: Evidence) -> bool:
    """Whether a cause is known already that another unbroken run could not change."""
    return bool(_not_gone_on(evidence) or _not_the_same_twice(evidence) or _not_restored(evidence))


def _not_gone_on(evidence: Evidence) -> list[str]:
    first, second, saved = evidence.first.main, evidence.second.main, evidence.saved
    if not first.places:
        return ["the script makes no Checkpoint: Checkpoint(folder).attach(trainer).resume() before trainer.run()"]
    if saved is None:
        if evidence.stopped:
            how = "attach a Checkpoint to the engine that trains: Checkpoint(folder).attach(trainer).resume()"
        elif evidence.told:
            how = (
                "attach allstep.Preemption beside the Checkpoint, so that the run saves when it is told to stop, or "
                "save more often: Checkpoint(every=...)"
            )
        else:
            how = "a failure comes without a notice, so save more often: Checkpoint(every=...)"
        return [f"nothing was saved before the first start ended: {how}"]
    if not evidence.second.ranks:
        return []
    if set(first.places) != set(second.places):
        then = ", ".join(second.places) or "none"
        return [
            f"each start saves to another folder ({', '.join(first.places)}, then {then}), so that it finds nothing "
            "there: give Checkpoint a folder that depends neither on the time nor on the process"
        ]
    went_on_at = evidence.second.went_on_at
    if went_on_at is not None and went_on_at < saved:
        return [
            f"iteration {saved} was saved, and the second start began behind iteration {went_on_at}: call "
            "checkpoint.resume() before trainer.run(), with the Checkpoint attached to the trainer"
        ]
    return []


def _not_the_same_twice(evidence: Evidence) -> list[str]:
    for one, other in ((evidence.first, evidence.unbroken), (evidence.unbroken, evidence.again)):
        parting = first_parting(one, other)
        if parting is not None:
            return [_why_not_the_same(one, other, parting)]
    return []


def _why_not_the_same(one: RunTrace, other: RunTrace, parting: Parting) -> str:
    says = f"the script is not the same twice: two runs part in iteration {parting.iteration} without any interruption"
    if one.main.at_begin.get("parameters") != other.main.at_begin.get("parameters"):
        return f"{says}, and begin with different weights: {_UNSEEDED}"
    if SAMPLES in parting.parts:
        source = "take them from world.loader, or from a sampler with a seed"
        return f"{says}, over different samples: {source}; and {_UNSEEDED}"
    if GENERATORS in parting.parts:
        return f"{says}, with different random numbers: {_UNSEEDED}"
    return (
        f"{says}, though weights, samples and random numbers were the same: a kernel is not deterministic "
        "(torch.use_deterministic_algorithms(True)), or something counts that differs from process to process"
    )


def _not_restored(evidence: Evidence) -> list[str]:
    saved, began = evidence.saved, evidence.second.main.at_begin
    before = evidence.first.main.iterations.get(saved) if saved is not None else None
    if before is None or not began:
        return []
    has = f"; it has: {', '.join(evidence.objects)}" if evidence.objects else ""
    return [f"{text}{has}" for part, text in _RESTORED.items() if before.get(part) != began.get(part)]


def _other_course(evidence: Evidence) -> list[str]:
    at = evidence.second.went_on_at
    if at is None:
        return []
    other_size = bool(evidence.other_size.ranks)
    ours, theirs = (each.parts(at + 1, other_size=other_size) for each in (evidence.unbroken, evidence.second))
    if not ours or not theirs:
        return []
    if ours.get(SAMPLES) != theirs.get(SAMPLES):
        return [
            f"the samples of iteration {at + 1} are others than in the unbroken run, so the order of data is not the "
            "sampler's: take them from world.loader, which goes on in the middle of an epoch, or give trainer.run a "
            "loader whose order depends on the epoch alone; where samples are augmented, draw from the global "
            "generators"
        ]
    before = evidence.first.main.iterations.get(at, {})
    if before.get("own generators") != evidence.second.main.at_begin.get("own generators"):
        return [_OWN_GENERATORS]
    if ours.get(GENERATORS) != theirs.get(GENERATORS):
        return [
            f"the random generators of Python, numpy or torch are elsewhere after iteration {at + 1} than in the "
            "unbroken run: something draws only when a run goes on, or only when it begins"
        ]
    return []


def _other_at_other_size(evidence: Evidence) -> list[str]:
    if not evidence.other_size.ranks:
        return []
    parting = first_parting(evidence.unbroken, evidence.other_size, other_size=True)
    if parting is None:
        return []
    sizes = f"{len(evidence.unbroken.ranks)} and {len(evidence.other_size.ranks)} ranks"
    return [
        f"unbroken runs on {sizes} take different samples in iteration {parting.iteration} already: have each "
        "iteration take the same samples on any number of ranks, as world.loader(dataset, global_batch_size=...) does"
    ]
