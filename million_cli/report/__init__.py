"""From result CSVs to one self-contained HTML page and PNG files.  No torch here.

sources.py      which CSVs are understood, and what their rows say in common terms
exhibit.py      a figure with its table, data and origin
style.py        how figures look, PNG and SVG
quality.py  positions.py  recall.py  scores.py  speed.py  kernels.py  breakdown.py  codebook.py  failures.py
                one kind of exhibit a file: rows in, exhibits out
page.py         the page, from page.html
"""
