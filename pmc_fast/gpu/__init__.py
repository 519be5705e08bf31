"""What implementations for GPUs share: products by torch, the loss in chunks of rows, and how rows that are no distribution are reported."""
