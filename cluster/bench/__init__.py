"""`flyray bench`: how fast parts of flyray are on this machine, against a floor or a peer measured in the same run."""
