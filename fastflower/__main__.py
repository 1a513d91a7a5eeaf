"""Run the command line as a module: `python -m fastflower COMMAND ...` or `torchrun -m fastflower COMMAND ...`."""

import sys

from fastflower.cli import main

if __name__ == "__main__":
    sys.exit(main())
