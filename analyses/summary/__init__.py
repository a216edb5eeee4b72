"""What a run says: a few numbers, one verdict, two protocols side by side."""
