"""What is true: maths, planning, training. Knows no orchestrator, tracker or store."""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once; `allocator` tells why
