"""What feeds: files of records, images and video to packed batches."""
