"""What training and inference read: images, codes, and in which order."""
