"""Images: the pixels of files and archives, held in memory or streamed, and augmented as whole batches."""
