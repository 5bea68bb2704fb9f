"""Corpora, their order, and their command lines; imports nothing else of this project."""
