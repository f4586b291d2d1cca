"""kv-align: one run of the flat-against-structured key/value alignment experiment.

The package knows nothing of how many runs there are (`launch`) or of what they show (`analysis`).
Importing it imports no torch.
"""

__version__ = "0.2.0"
