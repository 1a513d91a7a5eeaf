"""Data loading: turns shards and an `Augment` into batches on the device, in epoch order.

Start with `loader`, then `request`. The `backends` decode and render the images.
"""
