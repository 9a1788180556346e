"""Sparsity in motion: masks that training keeps exactly, and rules that change them."""
