"""What a model and an optimizer must do to be trained in parts: tried before they are."""
