"""C sources that are compiled into every exported module: its entry point and its thread pool."""
