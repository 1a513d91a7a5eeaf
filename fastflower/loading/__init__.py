"""Data loading: from shards and an `Augment` to batches on the device, in the order of the epoch.

Start with `loader`, then `request`. The `backends` decode and render the images.
"""
