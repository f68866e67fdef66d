"""Checks that a user's model and optimizer can be trained in parts, before they are."""
