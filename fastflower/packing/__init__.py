"""Turns a folder of images into shards.

The input is a folder in any layout that `layout` supports; the output is shards and a manifest. The same input, options
and seed give the same bytes. Read `packer` first: it scans the folder, plans the pack, makes the shards and publishes them.
"""
