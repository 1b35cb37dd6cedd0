"""Evaluation of image generators: distances, retrieval, mode coverage, grids."""
