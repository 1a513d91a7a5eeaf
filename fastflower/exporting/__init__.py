"""Exports trained networks to files that other programs run.

The file takes a raw image and gives the probabilities that `predict` gives, because the view is part of it.
"""
