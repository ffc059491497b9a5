"""Starting the ranks of a job on this machine and answering for them: what `allstep run` does. Imports no torch.

The parts, in the order a run meets them: `settings` (what was asked for, from the command line and `config`), `devices`
(how many workers), `nodes` (which of several machines this is), `supervisor` with `machine` (loop, terminal, signals),
`leading` (attempts, `restarts`, the report) or `following`, `gathering` with `post` and `joiner` (machines coming together
as `joining` says), `folder` (where logs go), `plan` (each worker's command line and environment), `attempt` with
`process` and `streams` (start, watch, end), `memory` (why the kernel killed), and `worker` (what runs inside each process
before the script). Who failed first, and in which words, is decided in `allstep.channel`.
"""
