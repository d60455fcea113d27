"""longctx trains GPT-style models at context lengths that one GPU cannot hold."""
