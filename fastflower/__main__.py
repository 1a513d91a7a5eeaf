"""The command line as a module: python -m fastflower VERB ..., also under torchrun -m."""

import sys

from fastflower.cli import main

if __name__ == "__main__":
    sys.exit(main())
