"""The lines of a run: whole, in order, and cut where a checkpoint was."""

from __future__ import annotations

import json
import math
import zlib

import numpy as np
import pytest
import torch

from allstep.errors import ArgumentError, ArgumentTypeError
from allstep.tracking import Histogram, Image
from allstep.tracking.journal import Journal
from allstep.tracking.values import Record, check_value, count_values, from_line, png, to_line


def record(step, **values):
    return Record(step, 1, 2.5, values)


def test_a_line_gives_the_record_back():
    values = {"loss": 0.1 + 0.2, "n": 3, "odd": math.inf, "text": "NaN", "h": Histogram((1, 2), (0.0, 1.0, 2.0))}
    whole = Record(7, 2, 1.5, {**values, "picture": Image("images/a.png")}, {"lr": 0.1})
    line = to_line(whole)
    assert json.loads(line, parse_constant=pytest.fail)["loss"] == 0.1 + 0.2
    assert from_line(line) == whole
    assert math.isnan(from_line(to_line(record(1, x=math.nan))).values["x"])


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path):
    Journal(tmp_path).append([record(1, x=1), record(2, x=2)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ep')
    journal = Journal(tmp_path)
    journal.append([record(3, x=3)])
    assert [each.step for each in Journal(tmp_path)] == [1, 2, 3]


def test_what_is_cut_is_kept_aside_and_the_cut_is_remembered(tmp_path):
    journal = Journal(tmp_path)
    journal.append([record(step, x=step) for step in range(1, 6)])
    journal.cut(9)
    journal.cut(3)
    journal.append([record(4, x=40)])
    again = Journal(tmp_path)
    assert [each.values["x"] for each in again] == [1, 2, 3, 40]
    assert again.cuts == [3]
    assert [json.loads(line)["x"] for line in (tmp_path / "withdrawn.jsonl").open()] == [4, 5]


def test_values_that_are_none_are_refused_by_name():
    with pytest.raises(ArgumentError, match="'step'"):
        check_value("step", 1)
    with pytest.raises(ArgumentError, match="'x' has 2 numbers"):
        check_value("x", torch.zeros(2))
    with pytest.raises(ArgumentTypeError, match="'x' is a list"):
        check_value("x", [1])


def test_a_tensor_that_the_next_step_changes_is_told_as_it_was():
    value = torch.tensor(1.0)
    kept = check_value("x", value)
    value += 1
    assert kept.item() == 1.0


def test_a_histogram_counts_each_number_once():
    found = count_values(torch.tensor([0.0, 0.1, 0.9, 1.0, math.nan]), bins=2).settle()
    assert (found.counts, found.edges) == ((3.0, 2.0), (0.0, 0.5, 1.0))
    assert sum(count_values(torch.ones(5)).settle().counts) == 5
    with pytest.raises(ArgumentError, match="at least one number"):
        count_values(torch.zeros(0))


def test_a_picture_becomes_a_png_file():
    content = png(torch.tensor([[0.0, 1.0], [0.5, 2.0]]))
    data = content[content.index(b"IDAT") + 4 :]
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert zlib.decompressobj().decompress(data) == bytes([0, 0, 255, 0, 128, 255])
    with pytest.raises(ArgumentError, match="an image has the shape"):
        png(np.zeros((2, 2, 5)))
