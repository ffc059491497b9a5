"""What torch's flight recorders hold, with and without torch's private names."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from allstep.monitor import torch_private
from allstep.monitor.torch_private import active_collectives, summary


def test_the_flight_recorders_unfinished_collectives_are_named():
    entries = [
        {"collective_seq_id": 11, "profiling_name": "gloo:all_reduce", "state": "completed"},
        {
            "collective_seq_id": 12,
            "profiling_name": "gloo:all_reduce",
            "state": "scheduled",
            "process_group": ["0", "default_pg"],
            "input_sizes": [[8]],
        },
    ]
    assert (
        summary(json.dumps({"entries": entries})) == "gloo:all_reduce #12 of group default_pg: scheduled, sizes [[8]]"
    )
    assert summary(json.dumps({"entries": entries[:1]})).endswith("completed")


@pytest.mark.parametrize("dump", [b"", b"[]", b"{}", b'{"entries": 3}', b'{"entries": [3]}'])
def test_a_record_that_cannot_be_read_is_done_without(dump):
    assert summary(dump) == ""


def test_without_torch_or_its_variables_nothing_is_recorded(monkeypatch):
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE", raising=False)
    monkeypatch.delenv("TORCH_NCCL_TRACE_BUFFER_SIZE", raising=False)
    assert active_collectives() == ""


@pytest.fixture
def recording(monkeypatch):
    """The flight recorder is turned on, and no warning has been given yet."""
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    torch_private.warn_once.cache_clear()
    yield torch._C._distributed_c10d
    torch_private.warn_once.cache_clear()


def dump(name: str):
    entry = {"collective_seq_id": 1, "profiling_name": name, "state": "started"}
    return lambda include, active: json.dumps({"entries": [entry]})


def test_the_records_of_nccl_and_of_the_other_backends_are_both_read(monkeypatch, recording):
    monkeypatch.setattr(recording, "_dump_nccl_trace_json", dump("nccl:all_reduce"), raising=False)
    monkeypatch.setattr(recording, "_dump_fr_trace_json", dump("gloo:barrier"), raising=False)
    assert active_collectives() == "nccl:all_reduce #1: started\ngloo:barrier #1: started"


def test_a_torch_without_the_private_names_gives_one_warning(monkeypatch, recording):
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        monkeypatch.delattr(recording, name, raising=False)
    with pytest.warns(RuntimeWarning, match="the report of a hang names no collectives"):
        assert active_collectives() == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert active_collectives() == ""


def test_a_private_function_that_raises_is_done_without(monkeypatch, recording):
    def broken(*_: object) -> str:
        raise TypeError("takes no arguments")

    monkeypatch.delattr(recording, "_dump_nccl_trace_json", raising=False)
    monkeypatch.setattr(recording, "_dump_fr_trace_json", broken, raising=False)
    assert active_collectives() == ""
