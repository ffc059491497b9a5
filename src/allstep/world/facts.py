"""What must be the same on all ranks, as text by name: a pure function of what the caller of `init` gives.

Contract: every rank sends its facts when it registers; they are compared before a process group is opened. Nested
mappings are taken apart, so that a difference is named by its own key: `config.optimizer.lr`. Of a secret, known by its
name, only a short sum is sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from allstep.errors import ArgumentTypeError
from allstep.protocol.masking import masked_value

_LONGEST = 200


def facts_of(
    given: Mapping[str, object] | None, environ: Mapping[str, str], versions: Mapping[str, str]
) -> dict[str, str]:
    """All facts of this rank.

    Args:
        given: by the caller of `init`.
        environ: where the launcher puts the digest of a configuration, as ALLSTEP_CONFIG.
        versions: of the packages that have to be the same.

    Raises:
        ArgumentTypeError: `given` is no mapping, or one of its keys no string.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ArgumentTypeError(f"facts is {given!r}; it must map names to values that are the same on all ranks")
    facts = {f"the version of {name}": version for name, version in versions.items()}
    if "ALLSTEP_CONFIG" in environ:
        facts["ALLSTEP_CONFIG"] = environ["ALLSTEP_CONFIG"]
    facts.update(_flat("", given or {}))
    return facts


def _flat(prefix: str, values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if not isinstance(key, str):
            raise ArgumentTypeError(f"facts has the key {key!r} under {prefix or 'its top'!r}; keys must be strings")
        # An empty mapping is a value like any other: it differs from one with keys.
        if isinstance(value, Mapping) and value:
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield prefix + key, _short(masked_value(key, str(value)))


def _short(text: str) -> str:
    """Long text by its ends and a digest, so that a registration stays small and any difference shows."""
    if len(text) <= _LONGEST:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]
    return f"{text[: _LONGEST // 2]}... ({len(text)} characters, sha256 {digest})"
