"""Reports of runs and previews of augmentation.

Takes a run's history and scores, or a recipe; writes history.csv, PNGs and one report.html. Read `report` first.
"""
