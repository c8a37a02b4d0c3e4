"""What people would otherwise pick, each driven as well as it can be."""
