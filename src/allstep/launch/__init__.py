"""Starting the ranks of a job on this machine and supervising them: what `allstep run` does. Imports no torch.

In the order in which a run meets them:
- what is asked for: `settings` (the table of all options), `config_file` (YAML);
- what is to be started: `supervisor`, with `devices` (how many workers), `topology` (which of several machines) and
  `core_binding` (which cores each worker runs on, in SLURM);
- the run on this machine: `machine`, with `event_loop`, `output` and `folder` (where logs go);
- the run over all its attempts: `head` on the machine that decides, `follower` on the others, which come together by
  `join_server` and `join_protocol`; `head_record` keeps the run's record;
- one attempt: `attempt`, with `worker_plan` and `environment` (what each worker gets), `workers`, `process` and
  `forking` (how they are started, watched and ended), `shared_imports` and `memory`;
- inside the workers' processes, before the script: `worker` and `template`, run by path, and `interpreter`.

Not here: how ranks report and who failed first (`allstep.monitor`, `allstep.diagnosis`), and how a process finds out
which rank it is (`allstep.placement`).
"""
