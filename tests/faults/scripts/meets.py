"""Opens a World and says so. PATIENCE is its time limit in seconds, LR_OF_K the setting of rank K."""

import os

import allstep

if __name__ == "__main__":
    own = os.environ.get(f"LR_OF_{os.environ.get('RANK')}", "0.1")
    patience = float(os.environ.get("PATIENCE", "300"))
    with allstep.init(timeout=patience, facts={"optimizer": {"name": "sgd", "lr": float(own)}}) as world:
        print("met", world.rank, "of", world.world_size, os.environ.get("ALLSTEP_CHANNEL", ""), flush=True)
        if "STAY" in os.environ:
            while not world.all_reduce(os.path.exists("go"), "max"):  # all leave in the same turn
                pass
