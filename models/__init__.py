"""Model families as ordered lists of layers. Importing this package imports no torch."""
