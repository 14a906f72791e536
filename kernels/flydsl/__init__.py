"""AMD's GPUs (gfx942): the fused experts in FlyDSL. Compiled and inspected without a GPU; never run on one."""
