"""FSS and RS: inner products, statistics, uncertainty, and pooling over batches."""
