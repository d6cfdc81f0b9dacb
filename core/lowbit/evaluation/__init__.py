"""How much a model lost: perplexity, and divergence from a base model."""
