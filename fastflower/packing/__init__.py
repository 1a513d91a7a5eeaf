"""Turns a folder of images into shards.

The input is a folder in any layout that `layout` knows; the output is shards and a manifest. The same input, options
and seed give the same bytes. Read `packer` first: it scans the folder, plans, makes each shard and publishes the result.
"""
