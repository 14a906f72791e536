"""`flyray eval`: perplexity and task scores of a checkpoint in several formats, through the engine."""
