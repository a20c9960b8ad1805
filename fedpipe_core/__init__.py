"""What is true: maths, planning, training. Knows no orchestrator, tracker or store."""

import atexit
import gc
import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once; `allocator` tells why
atexit.register(gc.freeze)  # else the last collections walk all of torch and transformers: up to 2 s of CPU
