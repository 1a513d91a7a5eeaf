"""Every random decision as a pure function of (seed, epoch, sample).

Takes an `Augment`, a seed, an epoch, and the samples' indices and sizes; returns the order of an epoch and a `Draw`:
plain numbers that a backend applies to images. Read `order` first, then `augment`.
"""
