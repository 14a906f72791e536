"""What all tests share."""

import os

# Tensors here are so small that torch's own threads cost more than they give, most of all beside another test process.
# By the environment, so that processes that tests start have it too; before torch is imported, which reads it then.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# Shared machines are slow at times; pytest's timeout stops what really hangs.
settings.register_profile("flyray", deadline=None)
settings.load_profile("flyray")
