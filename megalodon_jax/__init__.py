"""MEGALODON in JAX: a language model with unlimited context (Ma et al. 2024, arXiv 2404.08801)."""
