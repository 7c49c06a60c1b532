"""Downloads of large objects in parallel ranged reads, into a file or a memfd. Imports no AWS SDK."""
