"""Networks to compare with, a file each."""
