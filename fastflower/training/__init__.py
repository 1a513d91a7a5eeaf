"""The training loop and its parts.

Takes shards and a `Recipe`; writes checkpoints, a history and a report. Read `trainer` first, then `run`.
"""
