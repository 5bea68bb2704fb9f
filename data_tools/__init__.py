"""Corpora, data order and the data command lines; imports no other package of this project."""
