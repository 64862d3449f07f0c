"""Everything between documents and checkpoints: corpus, tokenizer, batches, optimizer, checkpoints, metrics."""
