"""Classify image files: python tools/predict.py CHECKPOINT IMAGES..."""

import sys

from fastflower.cli import main

sys.exit(main(["predict", *sys.argv[1:]]))
