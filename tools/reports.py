"""Repeat the experiments of the five student reports and compare the numbers: python tools/reports.py SHARDS"""

import sys

from fastflower.cli import main

sys.exit(main(["reports", *sys.argv[1:]]))
