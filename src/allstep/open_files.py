"""What a script left in the buffers of its open files, written out before a process ends by `os._exit`.

Contract: `os._exit` drops what the interpreter's own end would still write. `write_buffers` writes it, of every file
object that is alive, and raises nothing. It takes as long as the files take: where one may block, the caller bounds it.
Standard library only, and nothing of allstep: a worker's bootstrap loads this file by its path.
"""

import contextlib
import gc
import io
import sys
from typing import Any

_ANY_FILE: type = io.IOBase.__base__ or io.IOBase  # the class behind the abstract one, which is asked much faster


def write_buffers(*, close: bool) -> None:
    """Write out the buffers of all open files.

    Args:
        close: the script has ended. Files of classes written in Python are closed then, as the interpreter does with
            what goes away, since compressed ones write their end only so. Otherwise everything stays as it is.
    """
    # By its class: asking an object for what it is may run code of a proxy.
    files = [each for each in gc.get_objects() if issubclass(type(each), _ANY_FILE)]
    own = [each for each in files if type(each).__module__ != "_io"]
    texts = [each for each in files if type(each) is io.TextIOWrapper]
    # What writes into another file comes before that other file: text, then compression, then what writes to the disk.
    _each([*own, *texts], "flush")
    if close:
        _each([*_archives(), *own], "close")
    _each(files, "flush")


def _each(files: list[Any], method: str) -> None:
    for file in files:
        with contextlib.suppress(BaseException):  # closed, not for writing, or its other end is gone
            getattr(file, method)()


def _archives() -> list[Any]:
    """Open zip archives, which are no file objects, and write their table of contents when they go away."""
    kind = getattr(sys.modules.get("zipfile"), "ZipFile", None)
    return [] if kind is None else [each for each in gc.get_objects() if issubclass(type(each), kind)]
