"""Several strategies side by side: what is run, what was found, and the page that shows it.

entries   what is asked for: a strategy, its own settings, on how many ranks
runner    runs each in ranks of its own, in turns, and follows them
results   a row for each: `results.json` and `results.csv`
verdict   which is fastest, leanest, quietest; which differences are within noise
condition `fail_if`
charts, page, markdown    `report.html` and `report.md`
"""
