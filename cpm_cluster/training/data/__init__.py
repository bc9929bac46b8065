"""From rows of text to batches of tokens, any of them reachable: a run resumes at the very sample."""
