"""longctx trains GPT-style models at context lengths that one GPU cannot hold."""

__version__ = "0.1.0"
