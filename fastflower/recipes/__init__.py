"""A training run as a frozen value.

In come the numbers that a person chooses; out goes a `Recipe`, which training, checkpoints and reports take. Read `recipe`
first; `presets` has the reports' experiments and our own.
"""
