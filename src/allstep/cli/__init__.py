"""The `allstep` command: `main` dispatches, and each other file is one command. Imports no torch."""
