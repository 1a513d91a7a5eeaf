"""The storage format: tar shards with their indexes and manifest.json, in a local folder or at a URL.

`manifest` opens a folder of shards, `writer` writes tars, and `reader` reads samples by index and verifies their checksums.
Read `manifest` first, then `writer` and `reader`.
"""
