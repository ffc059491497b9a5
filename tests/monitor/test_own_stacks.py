"""The stacks of a process: on request, and left in a file by a timer."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading

from allstep.diagnosis.stacks import main_thread
from allstep.monitor.own_stacks import StacksTimer, make_stacks_file, own_stacks, read_stacks
from tests.monitor.driving import wait_for


def test_a_real_stack_has_the_main_thread_last_and_not_the_one_that_asks():
    found: list[str] = []

    def ask() -> None:
        found.append(own_stacks())

    thread = threading.Thread(target=ask, name="asks")
    thread.start()
    thread.join()
    assert "test_a_real_stack_has_the_main_thread_last" in main_thread(found[0])
    assert "in own_stacks" not in found[0]


def test_the_timer_writes_when_it_is_not_wound_up(monkeypatch):
    monkeypatch.setattr("allstep.monitor.own_stacks.WITHOUT_HEARTBEAT_S", 0.1)
    timer = StacksTimer()
    timer.wind_up()
    wait_for(lambda: "test_the_timer_writes_when" in main_thread(read_stacks(timer.address)))
    monkeypatch.setattr("allstep.monitor.own_stacks.WITHOUT_HEARTBEAT_S", 60)
    timer.wind_up()
    assert read_stacks(timer.address) == ""
    timer.close()


def test_a_timer_without_a_file_does_nothing(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    timer = StacksTimer()
    assert timer.address == ""
    timer.wind_up()
    timer.close()


def test_stacks_need_no_folder_for_temporary_files(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(own_stacks()))
    thread.start()
    thread.join()
    assert "test_stacks_need_no_folder" in main_thread(found[0])


def test_a_timer_whose_file_was_closed_leaves_the_next_file_alone(tmp_path):
    timer = StacksTimer()
    descriptor = int(timer.address.split("/")[4])
    os.close(descriptor)
    timer.wind_up()
    path = tmp_path / "kept"
    path.write_text("kept")
    other = os.open(path, os.O_RDWR)
    os.dup2(other, descriptor)
    timer.wind_up()
    timer.close()
    assert path.read_text() == "kept"
    for fd in {other, descriptor}:
        os.close(fd)  # it is still open


def test_a_stacks_file_is_read_from_another_process_and_ends_with_its_own():
    code = (
        "import os, sys; from allstep.monitor.own_stacks import make_stacks_file\n"
        "fd, address = make_stacks_file(); os.write(fd, b'in main'); print(address, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as process:
        address = process.stdout.readline().strip()
        assert read_stacks(address) == "in main"
        process.kill()
        process.wait()
        assert read_stacks(address) == ""


def test_another_file_at_the_address_is_not_read():
    descriptor, address = make_stacks_file()
    os.write(descriptor, b"in main")
    assert read_stacks(address) == "in main"
    assert read_stacks(address[:-1] + ("0" if address[-1] != "0" else "1")) == ""
    reading, writing = os.pipe()
    os.dup2(reading, descriptor)  # reading from it would block
    assert read_stacks(address) == ""
    for fd in (reading, writing, descriptor):
        os.close(fd)
    assert read_stacks("") == read_stacks("/etc/hostname") == ""
