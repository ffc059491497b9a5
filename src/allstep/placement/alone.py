"""No launcher: one process, a world of one."""

from __future__ import annotations

from collections.abc import Mapping

from allstep.placement.placement import Placement


class Alone:
    """What is left when no launcher's variables are there."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Always."""
        return True

    def place(self, environ: Mapping[str, str]) -> Placement:
        """A world of one, with a warning on a host of a TPU pod, whose other hosts it will not meet."""
        hosts = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
        if environ.get("PJRT_DEVICE") != "TPU" or len(hosts) < 2:
            return Placement(launcher="alone")
        warning = (
            f"this host is one of {len(hosts)} of a TPU pod (TPU_WORKER_HOSTNAMES), but this process trains alone;"
            " start one process per device on every host with torchrun or torch_xla.launch"
        )
        return Placement(launcher="alone", warnings=(warning,))
