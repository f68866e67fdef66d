"""One run: its parts, its folder, its weights, its checkpoints, its summary."""
