"""The contracts, one module each; import the classes from ``lowbit.testing``."""
