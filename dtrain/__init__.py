"""See, prove and choose how to train one model on many processes."""

__version__ = "0.1.0"
