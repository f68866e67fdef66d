"""Reports: what a person or a program reads of a run. Rank 0 alone writes them."""
