"""The `allstep` command line: `main` finds the command, and each other file is one command. Imports no torch.

What a command does is not here: `run_command` hands over to `allstep.launch`, `checkpoints_command` to
`allstep.checkpoint`. These files read arguments, print results and choose exit codes.
"""
