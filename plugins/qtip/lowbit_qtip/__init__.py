"""QTIP for lowbit. Registers nothing yet: this distribution reserves the name and its place in the workspace."""
