"""The one error of this package."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file or setting and says what to do."""
