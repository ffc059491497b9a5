"""What a step returned as values by name, one a sample, copied to the host.

Contract: pure functions of the output. The copies are the caller's own, so that a step may use its memory again; those
of an accelerator's tensors may still be under way, into pinned memory. What can go wrong: the output lacks a name, or
something in it has no value a sample (ValueError).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

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
