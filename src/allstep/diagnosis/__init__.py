"""Which rank failed first, which hangs, and how that is told: pure functions of what is known of each rank.

From what comes in to what is shown: `record` holds what is known of one rank, `rank_outcome` says what became of it,
`root_cause` chooses the first cause, `hang` finds ranks without progress, `stacks` reads what their
threads wait in, and `report` is the text and the JSON.

Not here: sockets, processes, files and clocks, which `allstep.monitor` has. Standard library only, since the launcher's
process judges and imports no torch.
"""
