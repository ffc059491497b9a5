"""What ranks, supervisors and machines say to each other besides collectives: sockets, lines of JSON, messages.

No decisions live here: `diagnosis` judges what was said, `monitor` runs the services that say it. Standard library
only.
"""
