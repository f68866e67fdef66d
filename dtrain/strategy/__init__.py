"""Strategies: each file or folder is one way to use the ranks along one axis of the device mesh."""
