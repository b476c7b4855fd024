"""`python -m sgopd`, which `torchrun -m sgopd train …` uses."""

import sys

from sgopd.cli import main

if __name__ == "__main__":
    sys.exit(main())
