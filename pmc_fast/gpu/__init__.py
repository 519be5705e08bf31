"""The host side of implementations for GPUs: products by torch, the loss in chunks of rows, and how rows that are no distribution are reported."""
