"""Memory and atomics: the arena shared by all processes of an instance. Nothing here knows what a model is."""

import sys

if sys.platform != "linux":
    raise ImportError(f"hotset needs Linux (futex, POSIX message queues), this is {sys.platform}")
