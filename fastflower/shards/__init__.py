"""The format on disk: tar shards, their indexes and manifest.json; also at an address.

In go images' bytes with labels; out come folders that `Manifest.load` opens and samples by index, each checked against its
checksum. Read `manifest` first, then `writer` and `reader`.
"""
