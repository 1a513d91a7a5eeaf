"""Say what holds training back: python tools/doctor.py SHARDS"""

import sys

from fastflower.cli import main

sys.exit(main(["doctor", *sys.argv[1:]]))
