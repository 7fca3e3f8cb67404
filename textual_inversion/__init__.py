"""Textual Inversion: the vectors of one new word, learned from photos (Gal et al., arXiv 2208.01618)."""
