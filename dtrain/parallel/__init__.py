"""What strategies are made of: the contract, the plan that folds them, and what is checked of models and optimizers."""
