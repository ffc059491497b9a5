"""Weights from a folder of safetensors files, as the Hugging Face hub lays them out, into a model on any mesh.

Contract: `load_pretrained` fills the parameters and persistent buffers of a module where they are. It is no
collective: each rank reads the files for itself, and of a tensor that is in parts over ranks only its own box. So no
rank holds more than one of its own parts besides the model. Values take on the dtype and the device that the model has.
A folder has one file of tensors, or several and an index of them (`model.safetensors.index.json` with a `weight_map`);
a path may also be that of one file. Weights that are tied in the model may be in the files under any of their names, or
under all.

All names and shapes are compared before a value is read, so that an error leaves the model as it was. Files are taken
for what they may be: nothing in them is executed, and an index names files of its own folder only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from allstep.errors import ArgumentError, ArgumentTypeError, CheckpointError, DamagedCheckpointError
from allstep.parallel.dtensor import is_dtensor
from allstep.parallel.plain_names import PlainNames
from allstep.parallel.torch_private import shard_boxes
from allstep.parallel.wrap import unwrap
from allstep.suggestions import did_you_mean

Rename = Callable[[str], str | None]
"""Gives a tensor's name in the model for its name in the files; None leaves it out."""

_SUFFIX = ".safetensors"
_INDEX = ".safetensors.index.json"
_MOST_NAMED = 5  # tensors in an error


class LoadedWeights(NamedTuple):
    """What did not fit where `strict` was False.

    Attributes:
        missing: names in the model that the files have no tensor for; these keep their values.
        unexpected: names in the files, after `rename`, that the model has not.
    """

    missing: list[str]
    unexpected: list[str]


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    """A tensor in a file, and what the model has of that name."""

    file: Path
    key: str
    name: str
    target: torch.Tensor


def load_pretrained(
    module: nn.Module, folder: str | Path, *, strict: bool = True, rename: Rename | None = None
) -> LoadedWeights:
    """Fill a model, in parts or whole, from a folder of safetensors files.

    Args:
        module: wrapped or not; it has to have values, so one that was built without goes through `wrap` first.
        folder: a local folder, or one `.safetensors` file.
        strict: refuse files that lack a tensor of the model, or have one more.
        rename: gives a name in the model for each in the files, or None for what is to be left out.

    Raises:
        ArgumentError, ArgumentTypeError: there is no such folder, or no such file in it; or an argument is no such.
        CheckpointError: names or shapes do not fit; the model is as it was.
        DamagedCheckpointError: a file cannot be read.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentTypeError(f"module is {module!r}; give the module whose weights are to be loaded")
    if rename is not None and not callable(rename):
        raise ArgumentTypeError(f"rename is {rename!r}; give a function of a name, such as {_EXAMPLE}")
    targets, ties = _targets(unwrap(module))
    found: dict[str, tuple[Path, str]] = {}
    for file, keys in _files(Path(folder)).items():
        for key in keys:
            name = key if rename is None else rename(key)
            if name is None:
                continue
            if name in found:
                raise CheckpointError(f"{folder} has two tensors for {name}: {found[name][1]} and {key}; see rename=")
            found[name] = file, key
    filled = {ties[name] for name in found if name in targets}
    missing = [name for name in targets if ties[name] not in filled]
    unexpected = [name for name in found if name not in targets]
    if strict and (missing or unexpected):
        raise CheckpointError(_misfit(str(folder), list(targets), list(found), missing, unexpected))
    sources = [_StoredTensor(*found[name], name, target) for name, target in targets.items() if name in found]
    _read(sources, str(folder))
    return LoadedWeights(missing, unexpected)


_EXAMPLE = 'lambda name: name.removeprefix("model.")'


def _targets(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The tensors of a module's state by plain name, and for each name a number that tied ones have in common."""
    names = PlainNames(module)
    # FSDP has its parameters back in parts once their state was asked for.
    state = {names.plain(name): value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    ties = {name: id(value) for name, value in state.items()}
    ties |= {names.plain(name): id(each) for name, each in module.named_parameters(remove_duplicate=False)}
    if meta := next((name for name, value in state.items() if value.is_meta), None):
        raise CheckpointError(
            f"{meta} is on the meta device and has no memory to be filled: put the model in parts first, by "
            "model = world.wrap(model), or build it with world.building(meta=False)"
        )
    return state, ties


def _files(folder: Path) -> dict[Path, Sequence[str]]:
    """The files of tensors, each with the names in it that are to be read."""
    if folder.is_file():
        if folder.suffix != _SUFFIX:
            raise ArgumentError(f"{folder} is no {_SUFFIX} file; give such a file, or a folder of them")
        return {folder: _keys(folder)}
    if not folder.is_dir():
        raise ArgumentError(f"there is no folder {folder}; give a local folder of {_SUFFIX} files, or one such file")
    indices, files = sorted(folder.glob(f"*{_INDEX}")), sorted(folder.glob(f"*{_SUFFIX}"))
    for several, what in ((indices, "indices"), (files, "files of tensors and no index")):
        if len(several) > 1 and (what == "indices" or not indices):
            raise ArgumentError(
                f"{folder} has {len(several)} {what}, {_in_short(each.name for each in several)}; "
                + ("leave one there" if what == "indices" else "give the path of one of them")
            )
    if indices:
        return _indexed(indices[0])
    if not files:
        raise ArgumentError(f"{folder} has no {_SUFFIX} file; other formats are not read")
    return {files[0]: _keys(files[0])}


def _indexed(index: Path) -> dict[Path, Sequence[str]]:
    try:
        placed = json.loads(index.read_bytes())["weight_map"]
        by_file: dict[Path, list[str]] = {}
        for key, file in placed.items():
            if type(file) is not str or Path(file).name != file:
                raise ValueError(f"{key} is in {file!r}, which is no file of this folder")
            by_file.setdefault(index.parent / file, []).append(key)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{index} is no index of tensors: {type(error).__name__}: {error}") from error
    for file, keys in by_file.items():
        if not file.is_file():
            raise DamagedCheckpointError(f"{index} names {file.name}, which is not there; fetch the folder again")
        if lacking := sorted(set(keys) - set(_keys(file))):
            raise DamagedCheckpointError(f"{file} lacks {_in_short(lacking)}, which {index.name} says it has")
    return dict(by_file)


def _keys(file: Path) -> list[str]:
    with _opened(file) as opened:
        return list(opened.keys())


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpointError(f"{file} cannot be read as safetensors: {error}") from error


@torch.no_grad()
def _read(sources: Sequence[_StoredTensor], folder: str) -> None:
    by_file: dict[Path, list[_StoredTensor]] = {}
    for each in sources:
        by_file.setdefault(each.file, []).append(each)
    for file, inside in by_file.items():
        with _opened(file) as opened:
            for each in inside:
                shape = list(opened.get_slice(each.key).get_shape())
                if shape != list(each.target.shape):
                    raise CheckpointError(
                        f"{each.name} has shape {shape} in {folder} and {list(each.target.shape)} in the model; build "
                        "the model with the sizes that it was saved with, or leave this one out: "
                        f"rename=lambda name: None if name == {each.key!r} else name, strict=False"
                    )
    for file, inside in by_file.items():
        with _opened(file) as opened:  # one at a time, since the pages of an open one that were read stay in memory
            for each in inside:
                _fill(opened, each)


def _fill(opened: Any, source: _StoredTensor) -> None:
    target = source.target
    if not is_dtensor(target):
        target.copy_(opened.get_tensor(source.key))
        return
    for offsets, sizes in shard_boxes(target):
        if all(sizes):
            box = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
            part = opened.get_slice(source.key)[box] if box else opened.get_tensor(source.key)
            target.to_local().copy_(part)


# What did not fit, in words


def _misfit(
    folder: str, known: Sequence[str], given: Sequence[str], missing: Sequence[str], unexpected: Sequence[str]
) -> str:
    parts = []
    if missing:
        parts.append(f"it lacks {_in_short(missing)}")
    if unexpected:
        near = did_you_mean(unexpected[0], missing) if missing else ""
        parts.append(f"the model has no {_in_short(unexpected)}{near}")
    remedy = _prefix_remedy(known, given) or "give rename= where names differ, or strict=False to load what fits"
    return f"{folder} does not fit the model: {'; '.join(parts)}. {remedy[0].upper()}{remedy[1:]}"


def _prefix_remedy(known: Sequence[str], given: Sequence[str]) -> str | None:
    """What to do where all would fit but for a prefix that one side has."""
    for longer, shorter, is_in_files in ((given, known, True), (known, given, False)):
        if not longer or not shorter:
            continue
        prefix = next((each.removesuffix(shorter[0]) for each in longer if each.endswith(f".{shorter[0]}")), "")
        if prefix and {each.removeprefix(prefix) for each in longer} & set(shorter):
            call = f"name.removeprefix({prefix!r})" if is_in_files else f"{prefix!r} + name"
            return f"one side has {prefix!r} before its names: give rename=lambda name: {call}"
    return None


def _in_short(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MOST_NAMED} more" if len(listed) > _MOST_NAMED else ""
    return ", ".join(listed[:_MOST_NAMED]) + more
