"""One HTML page of what quantizing a model lost, and what to do about it."""
