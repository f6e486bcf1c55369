"""Measurements: the file that keeps them, the sweep that makes them, and what follows from them."""
