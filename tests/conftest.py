"""What all tests share."""

from hypothesis import settings

# Shared machines are slow at times; pytest's timeout stops what really hangs.
settings.register_profile("flyray", deadline=None)
settings.load_profile("flyray")
