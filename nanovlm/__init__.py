"""nanovlm: six papers that taught language models to see, as one small PyTorch package.

A model is a vision encoder, a bridge and a language model; training is a list of stages that say what is frozen, what
learns, on which data. The files lie on floors, and imports go down only (README.md shows the tree).
"""

import os

# Threads that wait in turns of a loop are a little quicker on an idle machine, and forty times slower beside another
# program. Read by OpenMP when torch is loaded, so it stands here; what the user has set remains.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
