"""Whether this machine is fit to train on, asked before anything is started (`allstep doctor`). Imports no torch.

In the order of reading:
- `finding`: what a check says (`HostFinding`) and what it is told of the machine (`Host`);
- one file a subject: `software`, `torch_build`, `accelerators`, `network`, `limits` with `cgroups`, `clocks`,
  `scheduler`, and `run_folder` with `folder_probe`, which runs as a process of its own;
- `checking`: all of them at once, each bounded in time.

Not here: what is done about a finding (`allstep.cli`), and what a run sees once it has begun (`allstep.monitor`).
"""

from allstep.host_checks.finding import Host, HostFinding, Verdict

__all__ = ["Host", "HostFinding", "Verdict"]
