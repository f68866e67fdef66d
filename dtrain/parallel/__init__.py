"""What strategies are made of: the contract, the plan that folds them, checks of models and
optimizers.
"""
