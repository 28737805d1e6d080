"""nanovlm: six papers that taught language models to see, as one small PyTorch package.

A model is a vision encoder, a bridge and a language model; training is a list of stages that say what is frozen, what
learns, on which data. The files lie on floors, and imports go down only (README.md shows the tree).
"""

__version__ = "0.1.0"
