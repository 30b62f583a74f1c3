"""What is drafted: heads and other proposers, the trees of their drafts, the gate that decides whether to draft."""
