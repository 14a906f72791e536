"""Every kernel that a model's engine launches on a GPU, compiled where that GPU is not: `flyray build`."""
