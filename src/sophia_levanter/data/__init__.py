"""The data pipeline, from text to tokens to batches."""
