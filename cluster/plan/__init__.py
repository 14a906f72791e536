"""Where a model would lie on GPUs of a kind, and how fast it would run there: `flyray plan`, without a GPU."""
