"""Files that must be right: JSON that anybody may have written, writing that survives a crash,
locks.
"""
