"""Tasks: what is trained, on which batches, by which updates.

No task knows how it is distributed.
"""
