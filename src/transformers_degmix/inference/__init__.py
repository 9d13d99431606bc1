"""Many images at once: prediction while others are read and written, videos, and a page for the browser."""
