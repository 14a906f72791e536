"""`flyray verify`: is a checkpoint whole and sound, and how far is it from another of the same model."""
