"""Adapters: one host a file. Each imports its host when it is imported itself; none is imported by `sgopd`."""
