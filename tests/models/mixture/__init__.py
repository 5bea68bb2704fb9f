"""A decoder whose feed-forward layers are experts. It exists for the tests alone."""
