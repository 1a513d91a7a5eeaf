"""A folder of images becomes shards.

In comes a folder, in any layout that `layout` knows; out go shards and a manifest, the same bytes for the same input, options
and seed. Read `packer` first: it scans, plans, makes each shard and publishes.
"""
