"""`flyray batch`: OpenAI batch files, on an engine of its own or through a server."""
