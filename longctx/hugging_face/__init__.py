"""Models of Hugging Face: their configurations and weights, read and written."""
