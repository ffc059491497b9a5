"""What a person asks about runs and tells them, from any shell that sees their folders; imports no torch.

| module | what it does |
| --- | --- |
| `run_search` | the runs of a folder, by name, path or SLURM job |
| `run_status` | where a run is and how it is, from its record, its processes and SLURM |
| `run_logs` | what its ranks printed, across attempts, as it comes |
| `cancelling` | ending it, with a save first |

Nothing here speaks to the ranks or their monitor, so a question costs a run nothing. What is written into a record is
`allstep.run_record`'s, and what SLURM is asked `allstep.submission`'s.
"""
