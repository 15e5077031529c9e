"""FSS, RS and what they are made of: inner products, uncertainty, pooling over batches."""
