"""Many images at once: prediction while others are read and written, and videos."""
