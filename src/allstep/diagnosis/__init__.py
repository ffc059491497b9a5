"""Who failed first, who hangs, and how that is told: pure functions of what is known of each rank.

No sockets, no processes, no clock of its own: `monitor` gathers what is judged here. Standard library only.
"""
