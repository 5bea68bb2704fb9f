"""Model families as ordered lists of layers. Importing this package imports no torch."""

from models.siblings import use_siblings

use_siblings("parallel")
