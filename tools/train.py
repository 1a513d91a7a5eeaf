"""Train a classifier on shards: python tools/train.py SHARDS"""

import sys

from fastflower.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
