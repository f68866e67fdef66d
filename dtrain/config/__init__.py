"""Configurations: their schema, what is built from them, what is wrong with them, what must not be shown of them."""
