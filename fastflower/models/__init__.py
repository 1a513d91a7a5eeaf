"""Networks, checkpoints, evaluation and prediction.

Takes shards or image files and a checkpoint; returns scores or predictions. Read `checkpoint` first, then `inference`.
"""
