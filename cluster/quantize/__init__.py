"""Quantizing checkpoints: file by file, as Ray tasks, into the formats that flyray serves."""
