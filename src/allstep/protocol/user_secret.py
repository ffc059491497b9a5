"""The secret by which processes of one user on several machines know each other: given, or drawn once and kept.

ALLSTEP_SECRET wins where it is set: a scheduler carries it to all processes of a job. Otherwise it is in a file of the
user's own, `allstep/secret` in the folder for configuration (XDG_CONFIG_HOME, or `.config` at home). The first process
that looks for the file draws it. Where machines share the user's home they so have the same secret without anybody
doing anything. Keys for one run are derived from it (`authentication.derived_key`), and it is never sent.

The file is only believed where nobody else could have read or written it, as ssh does with its keys.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from allstep.errors import ConfigurationError

VARIABLE = "ALLSTEP_SECRET"
"""The environment variable that wins over the file."""

LEAST = 16
"""Characters of a secret that a person chooses, at least: who listens in can try shorter ones."""

_LONGEST = 4096
_PATIENCE_S = 5.0  # for what another process has begun to write, or a network's file system still hides


def user_secret(environ: Mapping[str, str]) -> str:
    """The secret of this process's user.

    Raises:
        ConfigurationError: ALLSTEP_SECRET is too short, or others than the user can read or write the file.
        OSError: there is no file and none can be made.
    """
    if VARIABLE in environ:
        return _given(environ[VARIABLE])
    path = secret_file(environ)
    deadline = time.monotonic() + _PATIENCE_S
    while not (text := _read(path)):
        _draw(path)
        if time.monotonic() >= deadline:
            raise OSError(0, f"{path} is empty; remove it, so that it is made anew")
        time.sleep(0.01)  # another process may be about to write it, of whose end there is nothing to wait for
    return text


def secret_file(environ: Mapping[str, str]) -> Path:
    """Where the secret of this process's user is kept.

    Raises:
        OSError: the user has no home.
    """
    if folder := environ.get("XDG_CONFIG_HOME", ""):
        return Path(folder) / "allstep" / "secret"
    home = environ.get("HOME") or os.path.expanduser("~")
    if not os.path.isabs(home):
        raise OSError(0, "this user has no home folder")
    return Path(home) / ".config" / "allstep" / "secret"


def _given(text: str) -> str:
    if len(text.strip()) < LEAST:
        raise ConfigurationError(
            f"{VARIABLE} has {len(text.strip())} characters; it must have {LEAST} or more, and be the same on all "
            "machines, as `openssl rand -hex 16` gives one"
        )
    return text.strip()


def _read(path: Path) -> str:
    """The secret in a file; "" where there is none yet."""
    try:
        # Not through a link: its target could be a file that somebody else may write.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return ""
    with open(descriptor, encoding="ascii", errors="replace") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            raise ConfigurationError(
                f"{path} is not this user's alone (mode {stat.S_IMODE(facts.st_mode):o}, user {facts.st_uid}), so that "
                "others may know the secret in it; remove it, and a new one is made"
            )
        return file.read(_LONGEST).strip()


def _draw(path: Path) -> None:
    """Make the file, whole from the start, unless another process is quicker."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(descriptor)
        # A link is made once or not at all, on file systems of a network too; a rename would take another's place.
        with contextlib.suppress(FileExistsError):
            os.link(own, path)
    finally:
        os.unlink(own)
