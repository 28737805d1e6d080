"""nanovlm: six papers that taught language models to see, as one small PyTorch package.

A model is a vision encoder, a bridge and a language model; training is a list of stages that say what is frozen, what
learns, on which data. The files lie on floors, and imports go down only (README.md shows the tree).
"""

import os

# How often an OpenMP thread (GNU's) looks for work before it sleeps: 300,000 times unless told, which is long where it
# shares a core with another program that could use it. It is read when torch is loaded, so it stands here; what the user
# has set remains.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"
