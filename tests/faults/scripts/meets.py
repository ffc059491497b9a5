"""Opens a World and says so.

PATIENCE is its time limit in seconds, LR_OF_K the setting of rank K. With TAKE, rank 1 tries to take rank 0's port
first; with STAY, the ranks stay until there is a file `go`.
"""

import os
import socket
import time

from allstep import init

if __name__ == "__main__":
    own = os.environ.get(f"LR_OF_{os.environ.get('RANK')}", "0.1")
    patience = float(os.environ.get("PATIENCE", "300"))
    if "TAKE" in os.environ and os.environ["RANK"] == "1":
        try:
            taken = socket.create_server(("", int(os.environ["MASTER_PORT"])))
        except OSError as error:
            print("cannot take the port:", error.strerror, flush=True)
    print("arriving", os.getpid(), flush=True)
    with init(timeout=patience, facts={"optimizer": {"name": "sgd", "lr": float(own)}}) as world:
        place = os.environ["MASTER_PORT"], os.environ.get("ALLSTEP_CHANNEL", "-")
        print(f"met {world.rank} of {world.world_size} at {' '.join(place)}\n", end="", flush=True)  # in one write
        if "STAY" in os.environ:
            while not world.all_reduce(os.path.exists("go"), "max"):  # all leave in the same turn
                time.sleep(0.05)  # the file is the only sign
