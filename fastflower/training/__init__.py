"""One straight loop, and what it needs.

In come shards and a `Recipe`; out go checkpoints, a history and a report. Read `trainer` first, then `run`.
"""
