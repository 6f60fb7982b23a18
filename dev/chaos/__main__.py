"""`python -m dev.chaos`. Next to nothing: each process that the suite forks imports this module anew."""

import sys

if __name__ == "__main__":
    from dev.chaos.command import main

    sys.exit(main())
