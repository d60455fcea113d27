"""How a model and a sequence are spread over ranks."""
