"""Every random decision as a pure function of (seed, epoch, sample).

In come an `Augment`, a seed, an epoch and the samples' indices and sizes; out go the order of an epoch and a `Draw`: plain
numbers that a backend carries out. Read `order` first, then `augment`.
"""
