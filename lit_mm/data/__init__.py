"""From files of records, images and video to packed batches."""
