"""Starting the ranks of a job on this machine and answering for them: what `allstep run` does. Imports no torch.

The parts, in the order a run meets them: `settings` (what was asked for, from the command line and `config`), `devices`
(how many workers), `folder` (where logs go), `plan` (each worker's command line and environment), `supervisor` (start,
watch, end), `worker` (what runs inside each process before the script), `ending` and `report` (who failed first, in
words).
"""
