"""Models. They import torch and `dtrain.model.layout`, and know nothing of distribution."""
