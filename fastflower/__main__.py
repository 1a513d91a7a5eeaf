"""Run the command line as a module: `python -m fastflower VERB ...` or `torchrun -m fastflower VERB ...`."""

import sys

from fastflower.cli import main

if __name__ == "__main__":
    sys.exit(main())
