"""What could go wrong on this machine, found before it does: `flyray doctor`."""
