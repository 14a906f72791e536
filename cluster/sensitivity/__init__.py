"""How much is lost when a part of a model is at fewer bits: measuring it, and the file that keeps it."""
