"""Studies of connected text, and the public packages that it comes from."""
