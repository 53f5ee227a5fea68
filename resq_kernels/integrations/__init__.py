"""Adapters to other libraries, each loaded only together with its library."""
