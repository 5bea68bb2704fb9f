"""The one exception that bad data and bad data settings raise."""


class DataError(ValueError):
    """A data file or data setting that cannot be used; the message is one line with a remedy."""
