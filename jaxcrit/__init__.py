"""jaxcrit: find the critical layers of a language model, and train, freeze, swap, edit and test exactly those."""

__version__ = "0.1.0"
