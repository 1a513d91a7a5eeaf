"""What a person looks at.

In come a run's history and scores, or a recipe; out go history.csv, PNGs and one report.html. Read `report` first.
"""
