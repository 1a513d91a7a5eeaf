"""Draw what a recipe makes of photographs: python tools/preview.py SHARDS"""

import sys

from fastflower.cli import main

sys.exit(main(["preview", *sys.argv[1:]]))
