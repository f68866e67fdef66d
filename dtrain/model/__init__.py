"""Models. They import torch and `dtrain.layout`, and know nothing of distribution."""
