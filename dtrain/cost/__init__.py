"""What a step costs: predicted from shapes, and measured."""
