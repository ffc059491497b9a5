"""torch's flight recorders, with and without torch's private names."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from allstep.monitor import torch_private
from allstep.monitor.collective_record import RecordedCollectives, record_collectives
from allstep.monitor.torch_private import dumps_as_json


@pytest.fixture
def recorder():
    """The module that has the private names; no warning has been given yet."""
    torch_private.warn_once.cache_clear()
    yield torch._C._distributed_c10d
    torch_private.warn_once.cache_clear()


def dump(name: str):
    entry = {"collective_seq_id": 1, "profiling_name": name, "state": "started"}
    return lambda include, active: json.dumps({"entries": [entry]}).encode()


def test_the_records_of_nccl_and_of_the_other_backends_are_both_read(monkeypatch, recorder):
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE", raising=False)  # the recorders are on without it
    monkeypatch.setattr(recorder, "_dump_nccl_trace_json", dump("nccl:all_reduce"), raising=False)
    monkeypatch.setattr(recorder, "_dump_fr_trace_json", dump("gloo:barrier"), raising=False)
    assert record_collectives(0, "").trace == "nccl:all_reduce #1: started\ngloo:barrier #1: started"


def test_one_recorder_behind_both_names_is_read_once(monkeypatch, recorder):
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        monkeypatch.setattr(recorder, name, dump("nccl:all_reduce"), raising=False)
    assert record_collectives(0, "").trace == "nccl:all_reduce #1: started"


def test_a_torch_without_the_private_names_gives_one_warning(monkeypatch, recorder):
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json", "_dump_nccl_trace", "_dump_fr_trace"):
        monkeypatch.delattr(recorder, name, raising=False)
    with pytest.warns(RuntimeWarning, match="the report of a hang names no collectives"):
        assert dumps_as_json() == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert record_collectives(0, "") == RecordedCollectives()


def test_without_the_analysers_format_no_file_is_written(monkeypatch, recorder, tmp_path):
    monkeypatch.setattr(recorder, "_dump_fr_trace_json", dump("gloo:barrier"))
    for name in ("_dump_nccl_trace", "_dump_fr_trace"):
        monkeypatch.delattr(recorder, name, raising=False)
    assert record_collectives(0, str(tmp_path)).trace == "gloo:barrier #1: started"
    assert list(tmp_path.iterdir()) == []


def test_a_private_function_that_raises_is_done_without(monkeypatch, recorder):
    def broken(*_: object) -> bytes:
        raise TypeError("takes no arguments")

    monkeypatch.delattr(recorder, "_dump_nccl_trace_json", raising=False)
    monkeypatch.setattr(recorder, "_dump_fr_trace_json", broken, raising=False)
    assert record_collectives(0, "") == RecordedCollectives()
