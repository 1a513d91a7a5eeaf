"""The hyperparameters of a training run as a frozen value.

Takes hyperparameters; returns a `Recipe`, which training, checkpoints and reports use. Read `recipe` first; `presets`
has the recipes of the student reports and our own.
"""
