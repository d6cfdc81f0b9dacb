"""Every built-in file format: one module each, found through the same entry points as third-party plugins."""
