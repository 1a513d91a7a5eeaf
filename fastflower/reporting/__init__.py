"""Reports and previews for people to look at.

Takes a run's history and scores, or a recipe; writes history.csv, PNGs and one report.html. Read `report` first.
"""
