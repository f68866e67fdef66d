"""Several strategies side by side: what is run, its figures, and the page that shows them.

entries       what is to be run: a strategy, its own settings, on how many ranks
description   what is known of each before it runs
runner        runs each in ranks of its own, in turns, and shows the progress
results       a row for each: `results.json` and `results.csv`
verdict       which is fastest, leanest, quietest; which differences are within noise
figures       the figures in words, and the table on the terminal
page, markdown            `report.html` and `report.md`
command       all of this in order
difference    two comparisons side by side: `--from`
survey, capabilities      which strategies go together
"""
