"""Configurations: their schema, what is built from them, a mistake in one line, what must not
be shown.
"""
