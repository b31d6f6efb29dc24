"""Module files: reading, checking and loading them. Imports no TVM."""
