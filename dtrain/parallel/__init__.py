"""The contract of strategies, the plan that folds them, and checks of models and optimizers."""
