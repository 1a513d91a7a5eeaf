"""Score a checkpoint on shards: python tools/evaluate.py CHECKPOINT SHARDS"""

import sys

from fastflower.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
