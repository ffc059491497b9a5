"""How a run is saved and goes on: the engine's `state_dict`, and what happens to the counters between runs.

Contract: a user saves an engine with `state_dict`, also inside a run, and loads it into another, whose next `run` goes
on at that place. `save` and `load` are that. `settle_counters` and `go_to_position` come before a run that goes on, and
`leave` after each run. All of them work on the engine's `Run`, and nothing here crosses ranks. What can go wrong: a
state that lacks a key raises before anything has changed, and so does data that is not the one that was saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from allstep.data.compositions import is_one_shot
from allstep.engine.events import is_count
from allstep.engine.passes import Passes
from allstep.engine.position import (
    RunPosition,
    group_size_over,
    is_same_data,
    position_to_save,
    restore_position,
    sampler_of,
)
from allstep.engine.run import Run
from allstep.engine.run_plan import RunArguments, begins_anew, is_evaluation, lengths_of
from allstep.engine.source import END, pass_position
from allstep.errors import ArgumentError
from allstep.parallel import forget_gradients, is_fully_sharded

_COUNTS = {
    *("iteration", "epoch", "epochs_completed", "epoch_began_at", "passes_began_at"),
    *("epoch_length", "max_epochs", "max_iters"),
}


def save(run: Run, passes: Passes | None, user_keys: Iterable[str]) -> dict[str, Any]:
    """What `Engine.state_dict` gives; see there. `passes` are those of the run that is under way, if one is."""
    state, iteration = run.state, run.steps_done
    inner = state.inner_iterations - run.steps_in_group
    epochs_completed, epoch_began_at = run.epochs_to_save
    terms = {"max_epochs": state.max_epochs} if state.max_iters is None else {"max_iters": state.max_iters}
    data = _position_in_data(run, passes, iteration)
    return {
        "iteration": iteration,
        "epochs_completed": epochs_completed,
        "epoch_began_at": epoch_began_at,
        "epoch_length": state.epoch_length,
        **({"inner_iterations": inner} if inner else {}),
        **({"epoch_is_pass": True} if run.epoch_is_pass else {}),
        **({"passes_began_at": run.passes_began_at} if run.passes_began_at else {}),
        **terms,
        **({} if data is None else {"data": data}),
        **({"finished": state.stop_reason} if state.outcome == "finished" else {}),
        **{key: getattr(state, key) for key in user_keys},
    }


def _position_in_data(run: Run, passes: Passes | None, iteration: int) -> dict[str, Any] | None:
    """What to save of the position in the data after `iteration` iterations."""
    state = run.state
    if state.dataloader is None:
        # Nothing has been run since the state was loaded, so what was loaded is still where the run stands.
        return dict(run.loaded_place) if run.was_loaded and run.loaded_place is not None else None
    sampler, epoch, done = sampler_of(state.dataloader), 0, 0
    if sampler is not None:
        epochs_completed, epoch_began_at = run.epochs_to_save
        epoch, done = pass_position(
            iteration,
            epoch_began_at,
            state.epoch_length,
            epochs_completed,
            None if run.epoch_is_pass else sampler.batches_in_epoch,
            passes_began_at=run.passes_began_at,
        )
    own = run.data_state if passes is None else passes.own_state(iteration)
    group_size = group_size_over(state.dataloader, run.settings.accumulate)
    return position_to_save(state.dataloader, epoch, done, own, group_size)


def load(run: Run, state_dict: Mapping[str, Any], user_keys: Iterable[str]) -> None:
    """Have the next run go on from a saved state. Raises ArgumentError before anything has changed."""
    user_keys = list(user_keys)
    # First, so that a state that is refused changes nothing.
    position = position_from(state_dict, user_keys)
    run.forget_progress()
    _stand_at(run, position, epoch_is_pass=state_dict.get("epoch_is_pass") is True)
    state = run.state
    state.dataloader = None
    state.stop_reason = state_dict.get("finished")
    state.outcome = None if state.stop_reason is None else "finished"
    for key in user_keys:
        setattr(state, key, state_dict[key])
    run.loaded_place, run.data_state, run.was_loaded = state_dict.get("data"), END, True


def settle_counters(run: Run, *, nested: bool) -> None:
    """Bring the counters back to what was completed, after a run that was left in its middle.

    An evaluation is then to begin anew. For any other run the gradients that its step trains are as they were
    before what is done again. `nested` says that an engine is running around this one.
    """
    run.is_nested = nested
    state = run.state
    if is_evaluation(run.settings, state, nested=nested) and not run.was_loaded:
        state.max_epochs = state.max_iters = None
    elif run.has_failed and (run.step_is_open or run.steps_in_group):
        _undo_step(run)
    if run.steps_in_group:
        # Done again, and its handlers with it.
        run.redone_until, run.unfinished = state.iteration, None
    state.iteration = run.steps_done
    state.inner_iterations -= run.steps_in_group
    state.epoch = run.epochs_completed
    run.steps_in_group = 0
    run.step_is_open = run.epoch_is_open = run.has_failed = False


def _undo_step(run: Run) -> None:
    """Begin what an exception has left, an iteration or its accumulation group, with no gradient; say what remains."""
    for module in run.modules:
        if is_fully_sharded(module):
            forget_gradients(module)
        for parameter in module.parameters():
            parameter.grad = None
    gradients = (
        f"The gradients of {len(run.modules)} modules are cleared"
        if run.modules
        else "It knows no module whose gradients it could clear: call zero_grad() before backward(), or append the "
        "model to engine.modules"
    )
    run.logger.warning(
        "the run goes on with iteration %d, after a failure, and does it again with its batch. %s. What else the step "
        "changed is not undone: random numbers that it drew, running statistics, an optimizer's step that it had begun",
        run.steps_done + 1,
        gradients,
    )


def go_to_position(run: Run, data: Any, arguments: RunArguments) -> tuple[int | None, RunArguments]:
    """Bring data and counters to where the run goes on: the position that was loaded, or where the last run was left.

    Both are taken up in the same way, so that an engine goes on as another one would that loaded its state.

    Returns:
        The batch with which `data` opens, None where it has to be brought there by counting; and the arguments, with
        `max_iters` in iterations of this data.
    """
    state, max_iters = run.state, arguments.max_iters
    run.own_lengths = exact, length = lengths_of(data)
    saved = run.loaded_place if run.was_loaded else None
    run.loaded_place = None
    if not run.was_loaded and not begins_anew(
        state,
        arguments.max_epochs,
        max_iters,
        epochs_completed=run.epochs_completed,
        resuming=run.unfinished is not None,
    ):
        saved = _place_left(run, data)
    if saved is None:
        return None, arguments
    terms = state.epoch_length, state.max_epochs, state.max_iters
    position = RunPosition(
        state.iteration, state.epoch, run.epoch_began_at, *terms, run.passes_began_at, state.inner_iterations
    )
    restored = restore_position(data, saved, position, group_size_over(data, run.settings.accumulate))
    _stand_at(run, restored.position, epoch_is_pass=run.epoch_is_pass)
    # Behind a last batch, and of several workers, a state may not tell data that has ended from data that begins: then
    # the epoch is counted out.
    is_full = state.iteration - run.epoch_began_at == state.epoch_length
    has_own_state = exact is None and restored.opens_at is not None
    if has_own_state and run.epoch_is_pass and (is_full or getattr(data, "num_workers", 0) > 0):
        run.own_lengths = state.epoch_length, length
    if max_iters == position.max_iters:
        arguments = replace(arguments, max_iters=state.max_iters)
    return restored.opens_at, arguments


def _place_left(run: Run, data: Any) -> dict[str, Any] | None:
    """Where the last run of this engine stood in its data; None where nothing of that is good for `data`."""
    before = run.state.dataloader
    if before is None or is_one_shot(data):  # an iterator stands where it was left
        return None
    place = _position_in_data(run, None, run.state.iteration)
    if data is before or place is None:
        return place
    # Other data is taken for the same in a new loader where an epoch goes on, and where it says that it is the same.
    is_inside_an_epoch = run.state.iteration > run.epoch_began_at
    return place if is_inside_an_epoch and is_same_data(data, place) else None


def leave(run: Run, passes: Passes | None) -> None:
    """End the run that is under way, if one is, and keep what the next one may go on from."""
    if passes is not None:
        run.data_state = passes.own_state(run.steps_done)
    if run.drive is not None:
        run.drive.close()  # a suspended loop keeps what it read ahead
    run.drive = None


def position_from(state_dict: Mapping[str, Any], user_keys: Iterable[str]) -> RunPosition:
    """Read a saved state, or one written by hand as for PyTorch-Ignite.

    Raises:
        ArgumentError: a key is missing, is no count, or contradicts another; names it.
    """
    if not isinstance(state_dict, Mapping):
        raise ArgumentError(f"the state to load is {state_dict!r}; it must be a mapping, as state_dict() gives it")
    for key in _COUNTS & state_dict.keys():
        value = state_dict[key]
        if value is not None and not is_count(value, least=0):
            raise ArgumentError(f"{key} is {value!r} in the state to load; it must be an int of at least 0")
    # Below 0 where a run went on with larger batches: there are fewer iterations than optimizer steps then.
    inner = state_dict.get("inner_iterations")
    if inner is not None and (isinstance(inner, bool) or not isinstance(inner, int)):
        raise ArgumentError(f"inner_iterations is {inner!r} in the state to load; it must be an int")
    missing = [key for key in ("epoch_length", *user_keys) if key not in state_dict]
    if missing:
        raise ArgumentError(f"the state to load lacks {', '.join(missing)}; it has {', '.join(state_dict)}")
    for pair in (("iteration", "epoch"), ("max_epochs", "max_iters")):
        if sum(key in state_dict for key in pair) != 1:
            raise ArgumentError(
                f"the state to load must have exactly one of {pair[0]} and {pair[1]}; it has {', '.join(state_dict)}"
            )
    if not isinstance(state_dict.get("finished"), str | None):
        raise ArgumentError(f"finished is {state_dict['finished']!r} in the state to load; it must be a text, why")
    length = state_dict["epoch_length"]
    if length is not None and length < 1:
        raise ArgumentError(f"epoch_length is {length} in the state to load; it must be at least 1, or None")
    if "epoch" in state_dict:
        if length is None and state_dict["epoch"]:
            raise ArgumentError("the state to load counts in epochs, so it needs an epoch_length; it has None")
        epochs = state_dict["epoch"]
        iteration = began_at = epochs * (length or 0)
    elif "epochs_completed" in state_dict and "epoch_began_at" in state_dict:
        iteration, epochs = state_dict["iteration"], state_dict["epochs_completed"]
        began_at = state_dict["epoch_began_at"]
    else:
        iteration = state_dict["iteration"]
        epochs = iteration // length if length else 0
        began_at = epochs * (length or 0)
    most = state_dict.get("max_epochs"), state_dict.get("max_iters")
    return RunPosition(iteration, epochs, began_at, length, *most, state_dict.get("passes_began_at") or 0, inner or 0)


def _stand_at(run: Run, position: RunPosition, *, epoch_is_pass: bool) -> None:
    state = run.state
    run.shown_length = position.epoch_length if epoch_is_pass else END
    state.iteration, state.epoch = position.iteration, position.epochs_completed
    state.epoch_length, state.max_epochs = position.epoch_length, position.max_epochs
    state.max_iters, run.epoch_began_at = position.max_iters, position.epoch_began_at
    run.passes_began_at, state.inner_iterations = position.passes_began_at, position.inner_iterations
