"""The services that watch over ranks while they run.

`client` is a rank's end. It reports to a `hub`, which a launcher's supervisor or a test drives, or a small process of
its own beside the ranks where no supervisor is (`sidecar`, `sidecar_process`). On other nodes a `relay` stands in for
the hub, with one connection to it (`uplink`) for all ranks of the node (`node_ranks`). `service` is what a driver may
ask of a hub or relay. `admission` lets ranks begin, `failure_detector` comes to a verdict, and `run_watch` keeps the
run's record.

Not here: what is said over the sockets, which is `allstep.protocol`, and what is concluded from it, which is
`allstep.diagnosis`. Standard library only, so that a launching parent and a sidecar never import torch.
"""
