"""Order, bytes, pixels, batches.

In come shards and an `Augment`; out go batches, in the order of the epoch, on the device. Read `loader` first, then `request`;
`backends` move the pixels.
"""
