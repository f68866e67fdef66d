"""Data: documents, clean and tokenised, in memory-mapped files; windows of them as batches."""
