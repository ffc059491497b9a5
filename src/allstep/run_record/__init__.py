"""A run's record: `run.json` and `events.jsonl` in its folder, who writes them, and what a reader makes of them.

Whoever watches over all ranks of a run writes: the supervisor of node 0 under `allstep run`, rank 0's sidecar under
torchrun and srun. `event_log` is the file, `recorder` what is written into it, `progress` how heartbeats of all ranks
become a few numbers. `run_history` reads it all back, `run_folders` says in which folder. Nothing here listens,
signals or asks SLURM. Standard library only.
"""
