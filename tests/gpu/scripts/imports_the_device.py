"""Two ranks whose script begins with an import that starts the device."""

from uses_device_at_import import AT_IMPORT

import allstep

with allstep.init(backend="gloo", device=str(AT_IMPORT.device)) as world:
    print(f"rank {world.rank} has {(AT_IMPORT + world.rank).sum().item():g}", flush=True)
    world.barrier()
