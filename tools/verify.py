"""Check shards against their checksums and indexes: python tools/verify.py SHARDS [--repair]"""

import sys

from fastflower.cli import main

sys.exit(main(["verify", *sys.argv[1:]]))
