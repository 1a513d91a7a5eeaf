"""Networks, and what is asked of trained ones.

In come shards or image files and a checkpoint; out go scores and predictions. Read `checkpoint` first, then `inference`.
"""
