"""The Python API: compiled modules, the cache, arrays of other frameworks."""
