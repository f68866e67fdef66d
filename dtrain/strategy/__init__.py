"""Strategies: each file is one way to use the ranks along one axis of the device mesh."""
