"""What ranks, monitors and machines say to each other besides collectives, and how it crosses a socket.

One family of messages (`messages`, written by `codec`), one way to connect (`connection`), one way to listen (`server`,
`address`). `registration` is how a rank introduces itself, `heartbeat` where it says that it is, and `worker_exit` how
its process ended. `private_files` is how a run's files are written and read.

Not here: what follows from a message, which `allstep.diagnosis` judges, and the services that say them, which are in
`allstep.monitor` and `allstep.launch`. Standard library only.
"""
