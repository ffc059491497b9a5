"""How the two ends of a new connection prove to each other that they have the key, without showing it: pure.

Everything that crosses a port of this package begins with it. The one that connects sends `Challenge`, a random text.
The one that listens answers with `Answer`: a random text of its own, and a proof made with the key of both texts. Then
the first sends `Proof`, made of the same two texts, and right behind it its first message. Each proof is an HMAC-SHA256
over the side that makes it, the port that was connected to, and both texts. So an old proof is of no use, nor is one
of the other side, nor one that was fetched from a service at another port.

Who does not have the key learns nothing but random texts, and a proof that it could try keys on. Keys are therefore
drawn at random, or come from a text of some length (`user_secret`).

Nothing that comes after is encrypted or signed: who can change packets on their way between two machines is not kept
out (see docs/explanation/security.md).

What can go wrong: `ChannelError` for a line that is not the expected one, or a proof that is not right.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from allstep.errors import ChannelError
from allstep.protocol.codec import Codec
from allstep.protocol.messages import VERSION

LONGEST = 512
"""Bytes of a line of the handshake, at most."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """The one that connects begins."""

    challenge: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The one that listens proves itself, and asks for the same."""

    challenge: str
    proof: str


@dataclass(frozen=True, slots=True)
class Proof:
    """The one that connected proves itself."""

    proof: str


_CODEC = Codec("the control channel", VERSION, (Challenge, Answer, Proof))


class ConnectingHandshake:
    """The side that connects.

    Args:
        key: what both sides have.
        port: that was connected to.

    Attributes:
        first: the line to send first.
    """

    def __init__(self, key: str, port: int) -> None:
        self._key = key
        self._port = port
        self._challenge = secrets.token_hex(16)
        self.first = _CODEC.encode(Challenge(self._challenge))

    def prove(self, line: bytes) -> bytes:
        """Check the other side's answer, and return the line that proves this side.

        Raises:
            ChannelError: it is no answer, or not from one that has the key.
        """
        answer = _CODEC.decode(line)
        if not isinstance(answer, Answer):
            raise ChannelError("it did not answer the challenge")
        texts = self._challenge, answer.challenge
        if not _equal(answer.proof, _proof(self._key, "listens", self._port, *texts)):
            raise ChannelError("what answers does not have this run's key")
        return _CODEC.encode(Proof(_proof(self._key, "connects", self._port, *texts)))


class ListeningHandshake:
    """The side that listens.

    Args:
        key: what both sides have.
        port: that this side listens at.

    Attributes:
        answered: whether the other side was answered.
    """

    def __init__(self, key: str, port: int) -> None:
        self._key = key
        self._port = port
        self._texts = ("", "")
        self.answered = False

    def receive(self, line: bytes) -> bytes:
        """Take the other side's next line; return what to send, or nothing where it has proved itself.

        Raises:
            ChannelError: it is not the line that has to come, or not from one that has the key.
        """
        message = _CODEC.decode(line)
        if isinstance(message, Challenge) and not self.answered:
            self.answered = True
            self._texts = message.challenge, secrets.token_hex(16)
            return _CODEC.encode(Answer(self._texts[1], _proof(self._key, "listens", self._port, *self._texts)))
        if not isinstance(message, Proof) or not self.answered:
            raise ChannelError("it did not begin with a challenge")
        if not _equal(message.proof, _proof(self._key, "connects", self._port, *self._texts)):
            raise ChannelError("it does not have this run's key")
        return b""


def derived_key(key: str, *purpose: object) -> str:
    """A key for one purpose, from which the first cannot be computed.

    Args:
        key: a secret.
        purpose: what the derived key is for; another purpose gives another key.
    """
    # Each part with its length, so that no two purposes are written alike.
    text = "".join(f"{len(str(part))}:{part}" for part in ("allstep", *purpose))
    return hmac.new(
        key.encode("utf-8", "surrogateescape"), text.encode("utf-8", "surrogateescape"), hashlib.sha256
    ).hexdigest()


def _proof(key: str, side: str, port: int, challenge: str, answer: str) -> str:
    return derived_key(key, "proof", side, port, challenge, answer)


def _equal(one: str, other: str) -> bool:
    # As bytes: of texts, compare_digest takes only ASCII ones.
    return hmac.compare_digest(one.encode(), other.encode())
