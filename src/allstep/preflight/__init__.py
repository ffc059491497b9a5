"""Whether all machines of a run are fit together, found out before training (`allstep run --preflight`).

- `agent` is a process on each machine that takes the steps which node 0 orders: `links` measures what is between two
  machines, and `device_sums`, a process for each device, computes and takes part in an all-reduce.
- `judgement` says from all answers which machine, pair or device is ill: pure.

Who orders the steps and waits for the answers is `allstep.launch.preflight_rounds`; what is looked at on each machine
by itself is `allstep.host_checks`. Only `device_sums` imports torch.
"""
