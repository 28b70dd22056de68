"""The method: sparse Parallel Adapters whose neurons and Adam state live in host memory. Imports torch alone."""
