"""Pack a folder of class folders into shards: python tools/pack.py DATA"""

import sys

from fastflower.cli import main

sys.exit(main(["pack", *sys.argv[1:]]))
