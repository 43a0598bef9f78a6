"""Object storage: which kind of path a text is, and the files of both kinds."""
