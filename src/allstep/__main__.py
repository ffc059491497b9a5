"""`python -m allstep` is the `allstep` command."""

import sys

from allstep.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
