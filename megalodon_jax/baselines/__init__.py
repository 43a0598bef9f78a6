"""The Llama-shaped Transformer that MEGALODON is compared with, in the same trainer."""
